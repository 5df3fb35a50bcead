-- ARGV: prefix, job, uid, fence, attempt, level, code, message, data; uid '' needs no fence.
local job, uid, fence, attempt, level, code, message, data = unpack(ARGV, 2, 9)
if uid ~= '' and not holds(job, uid, fence, attempt) then return 0 end
if redis.call('EXISTS', job_key(job)) == 0 then return 0 end
emit(job, level, code, message, data)
return 1
