-- ARGV: prefix, job, uid, fence, attempt, mode (fatal|retry|release), why, reason, max_attempts,
--       backoff_ms, backoff_cap_ms
-- Returns 1, or 0 where the fence is stale.
local job, uid, fence, attempt, mode, why, reason = unpack(ARGV, 2, 8)
local f, a, ended = unpack(redis.call('HMGET', unit_key(job, uid), 'fence', 'attempt', 'ended'))
if f == fence and a == attempt and ended == fence then
  return 1 -- the same end again, after a cut connection
end
if not holds(job, uid, fence, attempt) then return 0 end
redis.call('HSET', unit_key(job, uid), 'ended', fence)
if mode == 'fatal' then
  drop_lease(job, uid)
  redis.call('HSET', unit_key(job, uid), 'state', 'failed')
  end_job(job, 'failed', 'error', why, reason, why)
else
  end_attempt(job, uid, why, mode == 'release' and 0 or 1, tonumber(ARGV[9]), tonumber(ARGV[10]),
    tonumber(ARGV[11]))
end
return 1
