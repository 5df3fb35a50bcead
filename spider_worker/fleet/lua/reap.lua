-- ARGV: prefix, max_attempts, backoff_ms, backoff_cap_ms, hint_after_ms, limit
-- Returns {next due in ms or -1, job, queue, job, queue …}: jobs that need a hint.
local SPARE_HINTS = 100
local max_attempts, backoff, cap = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
for _, member in ipairs(redis.call('ZRANGEBYSCORE', leases_key, '-inf', now, 'LIMIT', 0, ARGV[6])) do
  local job, uid = string.match(member, '^(%S+) (.+)$')
  if redis.call('HGET', unit_key(job, uid), 'state') == 'live' then
    end_attempt(job, uid, 'its worker fell silent', 1, max_attempts, backoff, cap)
  else
    redis.call('ZREM', leases_key, member)
  end
end
local answer = { -1 }
local known = redis.call('ZCARD', active_key)
for _, job in ipairs(redis.call('ZRANGEBYSCORE', active_key, '-inf', now, 'LIMIT', 0, ARGV[6])) do
  local status, queue, max_runners, updated =
    unpack(redis.call('HMGET', job_key(job), 'status', 'queue', 'max_runners', 'updated'))
  if not status or TERMINAL[status] then
    redis.call('ZREM', active_key, job)
  else
    -- A runner that dies between two units leaves nothing live and nothing that expires.
    if now - tonumber(updated) > 1000 then settle(job) end
    local open = 0
    for _, kind in ipairs({ 'plan', 'work', 'publish', 'finalise' }) do
      open = open + redis.call('ZCARD', open_key(job, kind))
    end
    open = open + redis.call('ZCOUNT', delayed_key(job), '-inf', now)
    if open > 0 and not admit(job) then
      -- No work unit may begin now, so none of them is worth a hint.
      open = open - redis.call('ZCARD', open_key(job, 'work'))
      for _, uid in ipairs(redis.call('ZRANGEBYSCORE', delayed_key(job), '-inf', now)) do
        if redis.call('HGET', unit_key(job, uid), 'kind') == 'work' then open = open - 1 end
      end
    end
    local runners = redis.call('HLEN', holders_key(job))
    -- Hints that nobody reads say no more by being many, and would fill Redis in the end.
    local unread = redis.call('LLEN', prefix .. queue)
    if open > 0 and unread < SPARE_HINTS + known
        and (max_runners == '' or runners < tonumber(max_runners)) then
      answer[#answer + 1] = job
      answer[#answer + 1] = queue
    end
    redis.call('ZADD', active_key, now + tonumber(ARGV[5]), job)
  end
end
local due = redis.call('ZRANGE', active_key, 0, 0, 'WITHSCORES')[2]
if due then answer[1] = math.max(0, tonumber(due) - now) end
return answer
