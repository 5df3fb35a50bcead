-- ARGV: prefix, job, uid, fence, attempt, entry: register an attempt's journal under its fence.
local job, uid, fence, attempt, entry = unpack(ARGV, 2, 6)
if not holds(job, uid, fence, attempt) then return 0 end
redis.call('HSET', manifest_key(job), 'journal/' .. uid, entry)
return 1
