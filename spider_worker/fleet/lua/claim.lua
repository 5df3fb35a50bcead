-- ARGV: prefix, job, holder, nonce (also the attempt's id), lease_ms, kinds separated by commas,
--       life ('' for any): which life of the job the holder serves; each retry begins another,
--       and a runner of the one before still has its secrets
-- Returns {'unit', uid, kind, number, spec, fence, attempts, life, grant (dollars that it may spend;
--         '' without a budget)} | {'none', ms until one is due or -1}
local job, holder, nonce, lease, kinds, wanted = unpack(ARGV, 2, 7)
local status, cancel, max_runners, life =
  unpack(redis.call('HMGET', job_key(job), 'status', 'cancel', 'max_runners', 'life'))
if not status or TERMINAL[status] or cancel == '1' then return { 'none', -1 } end
life = life or '0'
if wanted ~= '' and wanted ~= life then return { 'none', -1 } end

local function answer(uid)
  local unit = unit_key(job, uid)
  local kind, number, spec, fence, attempts, grant =
    unpack(redis.call('HMGET', unit, 'kind', 'number', 'spec', 'fence', 'attempts', 'grant'))
  return { 'unit', uid, kind, number, spec, fence, attempts, life, grant or '' }
end

-- The same claim again (the client's retry after a cut connection) gets the same unit.
for _, uid in ipairs(redis.call('SMEMBERS', live_key(job))) do
  if redis.call('HGET', unit_key(job, uid), 'nonce') == nonce then return answer(uid) end
end
for _, uid in ipairs(redis.call('ZRANGEBYSCORE', delayed_key(job), '-inf', now)) do
  redis.call('ZREM', delayed_key(job), uid)
  open_unit(job, uid)
end
local others = tonumber(redis.call('HLEN', holders_key(job)))
local mine = redis.call('HEXISTS', holders_key(job), holder) == 1

-- A unit whose last attempt broke without progress runs alone: when a runner dies, each unit it
-- held counts an attempt, and a healthy one must not be used up beside a poisonous one.
local function first_open(kind)
  if kind ~= 'work' or not mine then return redis.call('ZRANGE', open_key(job, kind), 0, 0)[1] end
  for _, uid in ipairs(redis.call('ZRANGE', open_key(job, kind), 0, 63)) do
    if tonumber(redis.call('HGET', unit_key(job, uid), 'attempts')) == 0 then return uid end
  end
end

for kind in string.gmatch(kinds, '[^,]+') do
  local uid = first_open(kind)
  local capped = kind == 'work' and max_runners ~= '' and not mine and others >= tonumber(max_runners)
  local grant
  if uid and kind == 'work' and not capped then
    local allowed
    allowed, grant = admit(job)
    capped = not allowed
  end
  if uid and not capped then
    local unit = unit_key(job, uid)
    redis.call('ZREM', open_key(job, kind), uid)
    local fence = redis.call('HINCRBY', unit, 'fence', 1)
    redis.call('HINCRBY', unit, 'attempts', 1)
    redis.call('HSET', unit, 'state', 'live', 'attempt', nonce, 'nonce', nonce,
      'holder', holder, 'lease_until', now + lease)
    if grant then
      redis.call('HSET', unit, 'grant', string.format('%.17g', grant),
        'cost_before', redis.call('HGET', unit, 'cost') or 0)
    end
    redis.call('ZADD', leases_key, now + lease, job .. ' ' .. uid)
    redis.call('SADD', live_key(job), uid)
    redis.call('HINCRBY', holders_key(job), holder, 1)
    if kind == 'publish' then redis.call('HSET', job_key(job), 'unpublished', 0) end
    if status == 'queued' then
      set_status(job, 'running', 'info', 'job.running', 'a worker took the job',
        '{"status":"running"}')
    end
    emit(job, 'info', 'unit.claimed', uid .. ' taken by ' .. holder,
      cjson.encode({ unit = uid, kind = kind, fence = fence, holder = holder }))
    return answer(uid)
  end
end
local due = redis.call('ZRANGE', delayed_key(job), 0, 0, 'WITHSCORES')[2]
return { 'none', due and math.max(0, tonumber(due) - now) or -1 }
