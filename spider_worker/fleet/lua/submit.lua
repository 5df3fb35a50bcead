-- ARGV: prefix, job, owner, queue, document, body_hash, idempotency_key, max_runners,
--       event_history, secrets (ciphertext or ''), secret_ttl_s, max_live, budget, reserve
--       ('' for each cap that there is not)
local job, owner, queue, document, body_hash, idem = unpack(ARGV, 2, 7)
-- The same submit again, after a cut connection: ids are random, so nobody else made this one.
if redis.call('EXISTS', job_key(job)) == 1 then return { 'new', job } end
if idem ~= '' then
  local key = prefix .. 'idem:' .. owner .. ':' .. idem
  local known, hash = unpack(redis.call('HMGET', key, 'job', 'hash'))
  if known then
    if hash ~= body_hash then return { 'conflict', known } end
    return { 'known', known }
  end
  redis.call('HSET', key, 'job', job, 'hash', body_hash)
  redis.call('EXPIRE', key, 86400)
end
redis.call('HSET', job_key(job), 'schema', 1, 'owner', owner, 'queue', queue,
  'status', 'queued', 'document', document, 'submitted', now, 'updated', now, 'cancel', 0,
  'max_runners', ARGV[8], 'event_history', ARGV[9], 'planned', 0, 'work_left', 0, 'offset', 0,
  'publishes', 0, 'publish_every', 0, 'unpublished', 0, 'max_live', ARGV[12] or '',
  'budget', ARGV[13] or '', 'reserve', ARGV[14] or '')
if ARGV[10] ~= '' then
  redis.call('SET', prefix .. 'secrets:' .. job, ARGV[10], 'EX', ARGV[11])
end
add_unit(job, 'plan', 'plan', 0, '{}', 'open')
add_unit(job, 'publish', 'publish', 0, '{}', 'idle')
add_unit(job, 'finalise', 'finalise', 0, '{}', 'idle')
redis.call('ZADD', prefix .. 'owner:' .. owner .. ':jobs', now, job)
redis.call('ZADD', prefix .. 'jobs', now, job)
-- The submitter publishes the first hint itself; the reaper steps in if that is lost.
redis.call('ZADD', active_key, now + 2000, job)
emit(job, 'info', 'job.queued', 'waiting for a worker', '{"status":"queued"}')
return { 'new', job }
