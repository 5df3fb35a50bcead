-- ARGV: prefix, job, uid, fence, attempt, name, value (the pipeline's state, as in state.lua),
--       number of names to drop, those names, then (name, entry) pairs for the manifest
-- A unit's files and what they mean, while it runs: all of it or none of it, under the fence.
local job, uid, fence, attempt, name, value, drops = unpack(ARGV, 2, 8)
if not holds(job, uid, fence, attempt) then return 0 end
local first = 9 + tonumber(drops)
for i = 9, first - 1 do
  redis.call('HDEL', manifest_key(job), ARGV[i])
end
for i = first, #ARGV, 2 do
  redis.call('HSET', manifest_key(job), ARGV[i], ARGV[i + 1])
end
redis.call('HSET', prefix .. 'job:' .. job .. ':state', name, value)
return 1
