-- ARGV: prefix, job, uid, fence, attempt, counters, data (JSON text)
-- The event carries the job's totals: one line for a follower, whoever worked.
local job, uid, fence, attempt, counters, data = unpack(ARGV, 2, 7)
if not holds(job, uid, fence, attempt) then return 0 end
count(job, uid, counters)
-- Two a second for the whole job, however many runners: more would push everything else out
-- of its history, and each carries the totals anyway. 2: the counters were taken, and no event told
-- of them; whoever has news of its own asks again.
local last = redis.call('HGET', job_key(job), 'progress_at')
if last and now - tonumber(last) < 490 then return 2 end
redis.call('HSET', job_key(job), 'progress_at', now)
local metrics, flat = {}, redis.call('HGETALL', metrics_key(job))
for i = 1, #flat, 2 do metrics[flat[i]] = tonumber(flat[i + 1]) end
emit(job, 'info', 'progress', uid, '{"unit":' .. cjson.encode(uid) .. ',"metrics":'
  .. (next(metrics) and cjson.encode(metrics) or '{}') .. ',"engine":' .. data .. '}')
return 1
