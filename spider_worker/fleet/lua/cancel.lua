-- ARGV: prefix, job. A job that nobody works on ends here; others are told by the flag.
local job = ARGV[2]
local status = redis.call('HGET', job_key(job), 'status')
if not status then return 0 end
if TERMINAL[status] then return 1 end
if redis.call('HGET', job_key(job), 'cancel') ~= '1' then
  redis.call('HSET', job_key(job), 'cancel', 1)
  if redis.call('SCARD', live_key(job)) > 0 then
    emit(job, 'warning', 'job.cancelling', 'stopping; what is finished is kept')
  end
end
settle(job)
return 1
