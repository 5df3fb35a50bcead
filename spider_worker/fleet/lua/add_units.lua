-- ARGV: prefix, job, uid, fence, attempt, then (id, number, spec) of each new work unit.
local job, uid, fence, attempt = unpack(ARGV, 2, 5)
if not holds(job, uid, fence, attempt) then return 0 end
local added = 0
for i = 6, #ARGV, 3 do
  if add_unit(job, ARGV[i], 'work', ARGV[i + 1], ARGV[i + 2], 'open') then added = added + 1 end
end
redis.call('HINCRBY', job_key(job), 'work_left', added)
want_hint(job, now)
return 1
