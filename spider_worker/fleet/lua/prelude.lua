-- Shared by every script: time, names, events, and the one table of a job's transitions.
-- All keys hang under ARGV[1], the deployment's prefix. Times are milliseconds of Redis's
-- clock, so that no two machines ever have to agree on one.

local prefix = ARGV[1]

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local now = now_ms()

local function job_key(job) return prefix .. 'job:' .. job end
local function unit_key(job, uid) return prefix .. 'job:' .. job .. ':unit:' .. uid end
local function units_key(job) return prefix .. 'job:' .. job .. ':units' end
local function open_key(job, kind) return prefix .. 'job:' .. job .. ':open:' .. kind end
local function delayed_key(job) return prefix .. 'job:' .. job .. ':delayed' end
local function live_key(job) return prefix .. 'job:' .. job .. ':live' end
local function holders_key(job) return prefix .. 'job:' .. job .. ':holders' end
local function metrics_key(job) return prefix .. 'job:' .. job .. ':metrics' end
local function manifest_key(job) return prefix .. 'job:' .. job .. ':manifest' end
local function events_key(job) return prefix .. 'job:' .. job .. ':events' end
local leases_key = prefix .. 'leases'
local active_key = prefix .. 'active'

-- What may follow what. The store refuses everything else.
local TRANSITIONS = {
  queued = { running = true, failed = true, cancelled = true },
  running = { queued = true, completed = true, failed = true, cancelled = true },
  completed = { queued = true },   -- a retry of its errored rows
  failed = { queued = true },      -- a retry
  cancelled = { queued = true },   -- a retry
}
local TERMINAL = { completed = true, failed = true, cancelled = true }

-- 2026-01-31T12:00:00.123Z from milliseconds since 1970 (days to civil date, proleptic
-- Gregorian calendar); Lua's os.date is not to be had inside Redis.
local function iso(ms)
  local seconds = math.floor(ms / 1000)
  local days = math.floor(seconds / 86400)
  local rest = seconds - days * 86400
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524)
    - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, day,
    math.floor(rest / 3600), math.floor(rest / 60) % 60, rest % 60, ms % 1000)
end

-- Append an event and tell live readers. `data` is JSON text, never decoded here: cjson
-- would turn an empty list into an empty object.
local function emit(job, level, code, message, data)
  local offset = redis.call('HINCRBY', job_key(job), 'offset', 1) - 1
  local stamp = iso(now)
  local body = '{"offset":' .. string.format('%d', offset) .. ',"timestamp":"' .. stamp
    .. '","level":' .. cjson.encode(level) .. ',"code":' .. cjson.encode(code)
    .. ',"message":' .. cjson.encode(message) .. ',"data":' .. (data or '{}') .. '}'
  local keep = redis.call('HGET', job_key(job), 'event_history') or '10000'
  redis.call('XADD', events_key(job), 'MAXLEN', '~', keep,
    string.format('%d-1', offset), 'event', body)
  redis.call('HSET', job_key(job), 'updated', now)
  redis.call('PUBLISH', prefix .. 'live:' .. job, body)
  return offset
end

local function set_status(job, to, level, code, message, data)
  local from = redis.call('HGET', job_key(job), 'status')
  if from == to then return end
  if not TRANSITIONS[from] or not TRANSITIONS[from][to] then
    error({ err = 'SPIDER illegal transition from ' .. tostring(from) .. ' to ' .. to })
  end
  redis.call('HSET', job_key(job), 'status', to, 'updated', now)
  emit(job, level, code, message, data)
end

local function want_hint(job, at)
  local score = redis.call('ZSCORE', active_key, job)
  if not score or tonumber(score) > at then redis.call('ZADD', active_key, at, job) end
end

local function open_unit(job, uid)
  local unit = unit_key(job, uid)
  local kind, number = unpack(redis.call('HMGET', unit, 'kind', 'number'))
  redis.call('HSET', unit, 'state', 'open')
  redis.call('ZADD', open_key(job, kind), number, uid)
end

local function add_unit(job, uid, kind, number, spec, state)
  local unit = unit_key(job, uid)
  if redis.call('EXISTS', unit) == 1 then return false end
  redis.call('HSET', unit, 'kind', kind, 'number', number, 'spec', spec, 'state', state,
    'fence', 0, 'attempts', 0, 'counters', '{}')
  redis.call('ZADD', units_key(job), number, uid)
  if state == 'open' then open_unit(job, uid) end
  return true
end

-- Take a unit away from whoever holds it; what becomes of it is the caller's matter.
local function drop_lease(job, uid)
  local unit = unit_key(job, uid)
  local holder = redis.call('HGET', unit, 'holder')
  redis.call('ZREM', leases_key, job .. ' ' .. uid)
  redis.call('SREM', live_key(job), uid)
  redis.call('HDEL', unit, 'holder', 'nonce', 'lease_until')
  if holder and redis.call('HINCRBY', holders_key(job), holder, -1) <= 0 then
    redis.call('HDEL', holders_key(job), holder)
  end
end

local function end_job(job, to, level, message, reason, error_text)
  redis.call('HSET', job_key(job), 'reason', reason or '', 'error', error_text or '')
  for _, uid in ipairs(redis.call('SMEMBERS', live_key(job))) do
    -- Their writers are refused from now on; their journals stay readable, and a retry
    -- claims them under a higher fence.
    drop_lease(job, uid)
    redis.call('HSET', unit_key(job, uid), 'state', 'stopped')
  end
  redis.call('ZREM', active_key, job)
  redis.call('DEL', prefix .. 'secrets:' .. job)
  local data = { status = to }
  if reason and reason ~= '' then data.reason = reason end
  if error_text and error_text ~= '' then data.error = error_text end
  set_status(job, to, level, 'job.' .. to, message, cjson.encode(data))
end

-- With nothing live any more: a cancelled job ends, an unfinished one waits again.
local function settle(job)
  if redis.call('SCARD', live_key(job)) > 0 then return end
  local status, cancel = unpack(redis.call('HMGET', job_key(job), 'status', 'cancel'))
  if TERMINAL[status] then return end
  if cancel == '1' then
    end_job(job, 'cancelled', 'warning', 'cancelled; what was finished is kept', 'cancelled')
  elseif status == 'running' then
    set_status(job, 'queued', 'info', 'job.queued', 'waiting for a worker')
    want_hint(job, now)
  end
end

-- Does (fence, attempt) still hold the unit? Both, since a lost write can issue a number again.
local function holds(job, uid, fence, attempt)
  local state, f, a = unpack(redis.call('HMGET', unit_key(job, uid), 'state', 'fence', 'attempt'))
  return state == 'live' and f == fence and a == attempt
end

-- Caps of a job over the whole fleet, each nil where there is none: work units live at a time,
-- dollars in all, dollars that a work unit may spend.
local function caps(job)
  local max_live, budget, reserve =
    unpack(redis.call('HMGET', job_key(job), 'max_live', 'budget', 'reserve'))
  return tonumber(max_live), tonumber(budget), tonumber(reserve)
end

-- May another work unit begin? Yes: true and its grant in dollars (nil without a budget).
-- No: false, nil and the figures, `short` where it is for lack of money.
local function admit(job)
  local max_live, budget, reserve = caps(job)
  if not max_live and not budget then return true end
  local live, reserved = 0, 0
  for _, uid in ipairs(redis.call('SMEMBERS', live_key(job))) do
    local kind, grant, cost, before =
      unpack(redis.call('HMGET', unit_key(job, uid), 'kind', 'grant', 'cost', 'cost_before'))
    if kind == 'work' then
      live = live + 1
      local used = (tonumber(cost) or 0) - (tonumber(before) or 0)
      reserved = reserved + math.max(0, (tonumber(grant) or 0) - used)
    end
  end
  if max_live and live >= max_live then return false, nil, { live = live } end
  if not budget then return true end
  local spent = tonumber(redis.call('HGET', metrics_key(job), 'cost_usd') or 0)
  local left, grant, least = budget - spent - reserved, reserve, reserve
  if not reserve then
    -- An even part of what is left. What is not worth a start is a hundredth of the first one.
    local waiting = math.max(1, redis.call('ZCARD', open_key(job, 'work')))
    grant = left / math.min(waiting, max_live and max_live - live or waiting)
    least = budget / (max_live or 1) / 100
  end
  local cent = 1e-6 -- sums of floats must not refuse the last unit that fits exactly
  if grant > left + cent or grant < least - cent then
    return false, nil, { short = true, live = live, spent = spent, budget = budget, needed = least }
  end
  return true, grant
end

-- Where no work unit is live and the money is too little for another, those that wait are skipped:
-- the job ends with what it has, and a retry under a larger budget opens them again.
local function skip_unpaid(job)
  local allowed, _, why = admit(job)
  if allowed or not why.short or why.live > 0 then return end
  local skipped = redis.call('ZRANGE', open_key(job, 'work'), 0, -1)
  for _, uid in ipairs(redis.call('ZRANGE', delayed_key(job), 0, -1)) do
    if redis.call('HGET', unit_key(job, uid), 'kind') == 'work' then
      redis.call('ZREM', delayed_key(job), uid)
      skipped[#skipped + 1] = uid
    end
  end
  if #skipped == 0 then return end
  redis.call('DEL', open_key(job, 'work'))
  for _, uid in ipairs(skipped) do
    redis.call('HSET', unit_key(job, uid), 'state', 'skipped')
  end
  redis.call('HINCRBY', job_key(job), 'work_left', -#skipped)
  redis.call('HINCRBY', metrics_key(job), 'units_skipped', #skipped)
  emit(job, 'warning', 'budget.spent', string.format(
    '$%.2f of $%.2f spent, and another unit may take $%.2f: %d left out', why.spent, why.budget,
    why.needed, #skipped),
    cjson.encode({ spent_usd = why.spent, budget_usd = why.budget, needed_usd = why.needed,
      units = #skipped }))
end

-- Make the job's metrics follow a unit's cumulative counters, whatever was counted before.
local function count(job, uid, counters_json)
  local unit = unit_key(job, uid)
  local old = cjson.decode(redis.call('HGET', unit, 'counters') or '{}')
  local new = cjson.decode(counters_json)
  if caps(job) then
    -- What a unit spent stays spent, though an attempt that died may have told of less in its
    -- journal than in its reports.
    local known = tonumber(redis.call('HGET', unit, 'cost'))
    old['cost_usd'] = known
    if known then new['cost_usd'] = math.max(known, new['cost_usd'] or 0) end
    if new['cost_usd'] then
      redis.call('HSET', unit, 'cost', string.format('%.17g', new['cost_usd']))
    end
  end
  for name, value in pairs(new) do
    local delta = value - (old[name] or 0)
    if delta ~= 0 then
      redis.call('HINCRBYFLOAT', metrics_key(job), name, string.format('%.17g', delta))
    end
  end
  for name, value in pairs(old) do
    if new[name] == nil and value ~= 0 then
      redis.call('HINCRBYFLOAT', metrics_key(job), name, string.format('%.17g', -value))
    end
  end
  redis.call('HSET', unit, 'counters', counters_json)
  -- Attempts count failures in a row without progress: a poison row must not live on what
  -- came before it, and twenty pre-emptions must not end a healthy job.
  local mark = tonumber(redis.call('HGET', unit, 'mark') or '0')
  local done = new['rows_done'] or new['steps_done'] or 0
  if done > mark then redis.call('HSET', unit, 'mark', done, 'attempts', 1) end
end

-- Open what has become possible: a publication when enough was finished, the end when all was.
local function advance(job)
  local planned, cancel = unpack(redis.call('HMGET', job_key(job), 'planned', 'cancel'))
  if planned ~= '1' or cancel == '1' then return end
  skip_unpaid(job)
  local left, publishes, every, unpublished = unpack(redis.call('HMGET',
    job_key(job), 'work_left', 'publishes', 'publish_every', 'unpublished'))
  local publishing = redis.call('HGET', unit_key(job, 'publish'), 'state')
  if tonumber(left) == 0 then
    if publishing == 'open' or publishing == 'delayed' then
      redis.call('ZREM', open_key(job, 'publish'), 'publish')
      redis.call('ZREM', delayed_key(job), 'publish')
      redis.call('HSET', unit_key(job, 'publish'), 'state', 'idle')
      publishing = 'idle'
    end
    local final = redis.call('HGET', unit_key(job, 'finalise'), 'state')
    if publishing ~= 'live' and final == 'idle' then
      open_unit(job, 'finalise')
      want_hint(job, now)
    end
    return
  end
  if publishes == '1' and tonumber(every) > 0 and publishing == 'idle'
      and tonumber(unpublished) >= tonumber(every) then
    open_unit(job, 'publish')
  end
  -- Whoever was refused while the caps were reached is told that they are not any more.
  if caps(job) and redis.call('ZCARD', open_key(job, 'work')) > 0 and admit(job) then
    want_hint(job, now)
  end
end

-- An attempt ended without a commit. `penalty` 0: nobody's fault (a worker that shuts down).
local function end_attempt(job, uid, why, penalty, max_attempts, backoff, cap)
  local unit = unit_key(job, uid)
  local kind = redis.call('HGET', unit, 'kind')
  drop_lease(job, uid)
  if penalty == 0 then
    redis.call('HINCRBY', unit, 'attempts', -1)
    open_unit(job, uid)
    emit(job, 'info', 'unit.released', uid .. ': ' .. why, cjson.encode({ unit = uid }))
    want_hint(job, now)
    advance(job)
    return settle(job)
  end
  local attempts = tonumber(redis.call('HGET', unit, 'attempts'))
  if redis.call('HGET', job_key(job), 'cancel') == '1' then
    redis.call('HSET', unit, 'state', 'stopped')
    return settle(job)
  end
  if attempts >= max_attempts then
    if kind == 'publish' then
      -- Rows go on being made; the end of the job publishes, or fails for it.
      redis.call('HSET', unit, 'state', 'idle', 'attempts', 0)
      redis.call('HSET', job_key(job), 'unpublished', 0)
      emit(job, 'warning', 'publish.failed', 'publication put off: ' .. why,
        cjson.encode({ unit = uid, error = why }))
      advance(job)
      return settle(job)
    end
    redis.call('HSET', unit, 'state', 'failed')
    return end_job(job, 'failed', 'error',
      uid .. ' failed after ' .. attempts .. ' attempts: ' .. why, 'attempts_exhausted',
      uid .. ' failed after ' .. attempts .. ' attempts: ' .. why)
  end
  local delay = math.min(backoff * 2 ^ (attempts - 1), cap)
  redis.call('HSET', unit, 'state', 'delayed')
  redis.call('ZADD', delayed_key(job), now + delay, uid)
  want_hint(job, now + delay)
  emit(job, 'warning', 'unit.retrying', uid .. ': ' .. why,
    cjson.encode({ unit = uid, attempts = attempts, delay_s = delay / 1000, error = why }))
  advance(job) -- with all work done, the end publishes instead
  settle(job)
end
