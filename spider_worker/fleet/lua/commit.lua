-- ARGV: prefix, job, uid, fence, attempt, state (done|partial), counters, publishable,
--       outcome (JSON: what is special to the kind), then (name, entry) pairs for the manifest
-- Returns 1, or 0 where the fence is stale.
local job, uid, fence, attempt, state, counters, publishable, outcome_json = unpack(ARGV, 2, 9)
local unit = unit_key(job, uid)
local s, f, a, kind = unpack(redis.call('HMGET', unit, 'state', 'fence', 'attempt', 'kind'))
if f == fence and a == attempt and redis.call('HGET', unit, 'committed') == fence then
  return 1 -- the same commit again, after a cut connection
end
if not holds(job, uid, fence, attempt) then return 0 end
local outcome = cjson.decode(outcome_json)
local cancel = redis.call('HGET', job_key(job), 'cancel')
if kind ~= 'publish' then count(job, uid, counters) end
for i = 10, #ARGV, 2 do
  redis.call('HSET', manifest_key(job), ARGV[i], ARGV[i + 1])
end
drop_lease(job, uid)
redis.call('HSET', unit, 'committed', fence)
if state == 'partial' then
  redis.call('HSET', unit, 'state', 'stopped')
else
  redis.call('HSET', unit, 'attempts', 0, 'state', kind == 'publish' and 'idle' or 'done')
end
if kind == 'work' then
  redis.call('HDEL', manifest_key(job), 'journal/' .. uid)
  if state == 'done' then
    redis.call('HINCRBY', job_key(job), 'work_left', -1)
    redis.call('HINCRBY', job_key(job), 'unpublished', publishable)
  end
  emit(job, 'info', 'unit.committed', uid, cjson.encode({ unit = uid, complete = state == 'done' }))
elseif kind == 'plan' then
  redis.call('HSET', job_key(job), 'publishes', outcome.publishes and 1 or 0,
    'publish_every', outcome.publish_every or 0)
  if outcome.rows_total then
    redis.call('HSET', metrics_key(job), 'rows_total', outcome.rows_total)
  end
  local added = 0
  for _, spec in ipairs(outcome.units) do
    if add_unit(job, spec[1], 'work', spec[2], spec[3], 'open') then added = added + 1 end
  end
  redis.call('HINCRBY', job_key(job), 'work_left', added)
  redis.call('HSET', job_key(job), 'planned', 1)
  emit(job, 'info', 'job.planned', added .. (added == 1 and ' unit' or ' units'), cjson.encode({ units = added,
    rows_total = outcome.rows_total }))
elseif kind == 'finalise' then
  if outcome.remote and outcome.remote ~= '' then
    redis.call('HSET', job_key(job), 'remote', outcome.remote)
  end
  if outcome.error and outcome.error ~= '' then
    end_job(job, 'failed', 'error', outcome.error, outcome.reason or 'no_result', outcome.error)
  else
    -- A cancel that came after everything was finished takes nothing away.
    redis.call('HSET', job_key(job), 'cancel', 0)
    end_job(job, 'completed', 'info', outcome.message, '', '')
  end
  return 1
end
if state == 'partial' and cancel ~= '1' then
  -- It stopped for a cancel that is no more: somebody goes on from what it left.
  open_unit(job, uid)
  want_hint(job, now)
end
advance(job)
-- The writer is about to ask for its next unit: only a cancelled job settles here.
if cancel == '1' then settle(job) end
return 1
