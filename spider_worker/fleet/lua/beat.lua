-- ARGV: prefix, job, lease_ms, then (uid, fence, attempt) for each unit held.
-- Returns {cancel flag, 1|0 for each unit: still held}
local job, lease = ARGV[2], tonumber(ARGV[3])
local answer = { tonumber(redis.call('HGET', job_key(job), 'cancel') or '0') }
for i = 4, #ARGV, 3 do
  local uid = ARGV[i]
  if holds(job, uid, ARGV[i + 1], ARGV[i + 2]) then
    redis.call('HSET', unit_key(job, uid), 'lease_until', now + lease)
    redis.call('ZADD', leases_key, now + lease, job .. ' ' .. uid)
    answer[#answer + 1] = 1
  else
    answer[#answer + 1] = 0
  end
end
return answer
