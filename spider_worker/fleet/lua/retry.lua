-- ARGV: prefix, job, secrets (ciphertext or ''), secret_ttl_s, nonce, document ('': as it is),
--       budget (of that document)
-- Opens what is missing or has errored rows. Returns the number of units opened, or a word.
local job = ARGV[2]
local status, planned = unpack(redis.call('HMGET', job_key(job), 'status', 'planned'))
if not status then return 'missing' end
local last, answered = unpack(redis.call('HMGET', job_key(job), 'retry', 'retry_opened'))
if last == ARGV[5] then return tonumber(answered) end -- the same retry again
if not TERMINAL[status] then return 'active' end
local opened, work = 0, 0
redis.call('DEL', delayed_key(job), open_key(job, 'plan'), open_key(job, 'work'),
  open_key(job, 'publish'), open_key(job, 'finalise'), holders_key(job), live_key(job))
for _, uid in ipairs(redis.call('ZRANGE', units_key(job), 0, -1)) do
  local unit = unit_key(job, uid)
  local kind, state, counters = unpack(redis.call('HMGET', unit, 'kind', 'state', 'counters'))
  if kind == 'work' or kind == 'plan' then
    local errors = cjson.decode(counters)['rows_error'] or 0
    if state ~= 'done' or errors > 0 then
      redis.call('HSET', unit, 'attempts', 0, 'mark', 0, 'rerun', state == 'done' and 1 or 0)
      open_unit(job, uid)
      opened = opened + 1
      if kind == 'work' then work = work + 1 end
    end
  else
    redis.call('HSET', unit, 'attempts', 0, 'state', 'idle')
  end
end
if opened == 0 and status == 'completed' then return 'nothing' end
redis.call('HSET', job_key(job), 'cancel', 0, 'error', '', 'reason', '', 'work_left', work,
  'unpublished', 0, 'retry', ARGV[5], 'retry_opened', opened)
if ARGV[6] and ARGV[6] ~= '' then
  redis.call('HSET', job_key(job), 'document', ARGV[6], 'budget', ARGV[7])
end
redis.call('HDEL', metrics_key(job), 'units_skipped')
redis.call('HINCRBY', job_key(job), 'life', 1)
if ARGV[3] ~= '' then redis.call('SET', prefix .. 'secrets:' .. job, ARGV[3], 'EX', ARGV[4]) end
redis.call('ZADD', active_key, now + 2000, job)
set_status(job, 'queued', 'info', 'job.queued', 'retry: ' .. opened .. (opened == 1 and ' unit' or ' units'),
  cjson.encode({ status = 'queued', retry = true, units = opened }))
if planned == '1' then advance(job) end
return opened
