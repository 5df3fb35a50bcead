-- ARGV: prefix, job, ms: a worker that cannot serve the job now asks for a hint later.
local job = ARGV[2]
local status = redis.call('HGET', job_key(job), 'status')
if status and not TERMINAL[status] then want_hint(job, now + tonumber(ARGV[3])) end
return 1
