-- ARGV: prefix, job, owner, queue, document, submitted_ms, max_runners, max_live, budget, reserve
--       ('' for each cap that there is not), event_history,
--       remote ('' for none), ended (1: it had come to its end), message, rows_total ('' where
--       unknown), number of units, then
--       (id, number, spec, fence, counters, state) of each, then (name, entry) for the manifest
-- Returns 1, or 0 where the job is there.
local job, owner, queue, document, submitted = unpack(ARGV, 2, 6)
local ended, message, units = ARGV[13] == '1', ARGV[14], tonumber(ARGV[16])
if redis.call('EXISTS', job_key(job)) == 1 then return 0 end
redis.call('HSET', job_key(job), 'schema', 1, 'owner', owner, 'queue', queue,
  'status', ended and 'completed' or 'failed', 'document', document, 'submitted', submitted,
  'updated', now, 'cancel', 0, 'max_runners', ARGV[7], 'max_live', ARGV[8],
  'budget', ARGV[9], 'reserve', ARGV[10], 'event_history', ARGV[11],
  'planned', ended and 1 or 0, 'work_left', 0, 'offset', 0, 'publishes', 0, 'publish_every', 0,
  'unpublished', 0, 'reason', ended and '' or 'redis_lost', 'error', ended and '' or message)
if ARGV[12] ~= '' then redis.call('HSET', job_key(job), 'remote', ARGV[12]) end
-- Planning again adds the units that are missing, and only those.
add_unit(job, 'plan', 'plan', 0, '{}', ended and 'done' or 'idle')
add_unit(job, 'publish', 'publish', 0, '{}', 'idle')
add_unit(job, 'finalise', 'finalise', 0, '{}', 'idle')
if ARGV[15] ~= '' then redis.call('HSET', metrics_key(job), 'rows_total', ARGV[15]) end
local at = 17
for _ = 1, units do
  local uid, number, spec, fence, counters, state = unpack(ARGV, at, at + 5)
  add_unit(job, uid, 'work', number, spec, state)
  redis.call('HSET', unit_key(job, uid), 'fence', fence)
  count(job, uid, counters)
  at = at + 6
end
for i = at, #ARGV, 2 do redis.call('HSET', manifest_key(job), ARGV[i], ARGV[i + 1]) end
redis.call('ZADD', prefix .. 'owner:' .. owner .. ':jobs', submitted, job)
redis.call('ZADD', prefix .. 'jobs', submitted, job)
emit(job, ended and 'info' or 'error', ended and 'job.completed' or 'job.failed', message,
  cjson.encode({ status = ended and 'completed' or 'failed', rebuilt = true }))
return 1
