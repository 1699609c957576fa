"""The Lua scripts: each transition of the store as one atomic step.

A script checks everything before its first write, because Redis rolls nothing back. Answers are
arrays whose first element is a word (``ok``, ``fenced``, ``version``, ``effect``). Written for
Redis 7.0, Valkey and fakeredis alike.

Answers of Redis, whatever its client makes of them.
"""

from __future__ import annotations

ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {'held', holder} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {'ok', redis.call('INCR', KEYS[2])}
"""

RENEW = """
local holder = redis.call('GET', KEYS[1])
if redis.call('GET', KEYS[2]) ~= ARGV[2] or (holder and holder ~= ARGV[1]) then return {'fenced'} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return {'ok'}
"""

RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('GET', KEYS[2]) == ARGV[2] then
  redis.call('DEL', KEYS[1])
end
return {'ok'}
"""

# KEYS: clients, addresses, alive, epoch; ARGV: address, wanted, record, now, expires, epoch
IDENTITY = """
if (redis.call('GET', KEYS[4]) or '0') ~= ARGV[6] then return {'fenced'} end
local address, client, now = ARGV[1], ARGV[2], tonumber(ARGV[4])
local held = redis.call('HGET', KEYS[2], address)
if client == '' then
  client = held
  local n = 0
  while not client do
    n = n + 1
    local candidate = 'client-' .. n
    local until_ms = redis.call('ZSCORE', KEYS[3], candidate)
    if not until_ms or tonumber(until_ms) <= now then client = candidate end
  end
end
local before = redis.call('HGET', KEYS[1], client)
if held and held ~= client then redis.call('ZREM', KEYS[3], held) end
if before then
  local old = string.match(before, '^(%S+)')
  if old ~= address then redis.call('HDEL', KEYS[2], old) end
end
redis.call('HSET', KEYS[1], client, address .. ' ' .. ARGV[3])
redis.call('HSET', KEYS[2], address, client)
redis.call('ZADD', KEYS[3], ARGV[5], client)
return {'ok', client}
"""

# KEYS: addresses, alive, epoch; ARGV: client, address, epoch
FREE = """
if (redis.call('GET', KEYS[3]) or '0') ~= ARGV[3] then return {'fenced'} end
if redis.call('HGET', KEYS[1], ARGV[2]) == ARGV[1] then redis.call('ZREM', KEYS[2], ARGV[1]) end
return {'ok'}
"""

# KEYS: jobs, order, operations; ARGV: name, entry, operation, taken...
ENQUEUE = """
local known = redis.call('HGET', KEYS[3], ARGV[3])
if known then return {'ok', known} end
local taken = {}
for i = 4, #ARGV do taken[ARGV[i]] = true end
local job, n = ARGV[1], 1
while taken[job] or redis.call('HEXISTS', KEYS[1], job) == 1 do
  n = n + 1
  job = ARGV[1] .. '-' .. n
end
redis.call('HSET', KEYS[1], job, ARGV[2])
redis.call('RPUSH', KEYS[2], job)
if ARGV[3] ~= '' then redis.call('HSET', KEYS[3], ARGV[3], job) end
return {'ok', job}
"""

# KEYS: jobs, epoch; ARGV: job, epoch ('' when any server may), field, value, field, value ...
MARK = """
local entry = redis.call('HGET', KEYS[1], ARGV[1])
if not entry then return {'missing'} end
if ARGV[2] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[2] then return {'fenced'} end
entry = cjson.decode(entry)
local ended = entry.status ~= 'queued' and entry.status ~= 'running'
if ended then return {'ended'} end
for i = 3, #ARGV, 2 do entry[ARGV[i]] = cjson.decode(ARGV[i + 1]) end
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(entry))
return {'ok'}
"""

# One key, the job's meta hash, and the epoch that claims it.
CLAIM = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and tonumber(epoch) > tonumber(ARGV[1]) then return {'fenced'} end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1])
return {'ok'}
"""

# KEYS: meta, tasks, effects, events, outbox
# ARGV: operation, epoch, version, header, then five counted lists:
#       tasks set (id, json), tasks deleted, effects (id, sha), events, outbox, relayed
COMMIT = """
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'version', 'operation', 'answer')
local epoch, version = tonumber(meta[1] or '0'), tonumber(meta[2] or '0')
if epoch ~= tonumber(ARGV[2]) then return {'fenced', tostring(epoch)} end
if meta[3] == ARGV[1] then return cjson.decode(meta[4]) end
if version ~= tonumber(ARGV[3]) then return {'version', tostring(version)} end
local lists, at = {}, 5
for list = 1, 6 do
  local n = tonumber(ARGV[at])
  lists[list] = {first = at + 1, last = at + n}
  at = at + n + 1
end
local effects = lists[3]
for i = effects.first, effects.last, 2 do
  if redis.call('HEXISTS', KEYS[3], ARGV[i]) == 1 then return {'effect', ARGV[i]} end
end
local function all(command, key, list)
  for i = list.first, list.last, 1000 do
    redis.call(command, key, unpack(ARGV, i, math.min(i + 999, list.last)))
  end
end
all('HSET', KEYS[2], lists[1])
all('HDEL', KEYS[2], lists[2])
all('HSET', KEYS[3], effects)
local answer = {'ok', tostring(version + 1), tostring(lists[4].last - lists[4].first + 1)}
for i = lists[4].first, lists[4].last do
  answer[#answer + 1] = redis.call('XADD', KEYS[4], '*', 'e', ARGV[i])
end
for i = lists[5].first, lists[5].last do
  answer[#answer + 1] = redis.call('XADD', KEYS[5], '*', 'm', ARGV[i])
end
all('XDEL', KEYS[5], lists[6])
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'header', ARGV[4]) end
redis.call('HSET', KEYS[1], 'version', version + 1, 'operation', ARGV[1], 'answer', cjson.encode(answer))
return answer
"""


def text_of(value: str | bytes) -> str:
    """Read an answer of a client that decodes or of one that does not."""
    return value.decode() if isinstance(value, bytes) else str(value)
