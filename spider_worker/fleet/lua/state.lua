-- ARGV: prefix, job, uid, fence, attempt, name, value: keep JSON for a pipeline under the fence.
local job, uid, fence, attempt, name, value = unpack(ARGV, 2, 7)
if not holds(job, uid, fence, attempt) then return 0 end
redis.call('HSET', prefix .. 'job:' .. job .. ':state', name, value)
return 1
