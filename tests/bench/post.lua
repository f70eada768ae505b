-- For wrk: posts bodies, one after the other; prints what came of it as JSON, times in seconds.
--   wrk … -s post.lua URL -- CONTENT_TYPE FILE [CONTENT_TYPE FILE]…
local requests, at = {}, 0

local function read(path)
   local file = assert(io.open(path, "rb"))
   local data = file:read("*a")
   file:close()
   return data
end

function init(args)
   wrk.method = "POST"
   for i = 1, #args, 2 do
      wrk.headers["Content-Type"] = args[i]
      wrk.body = read(args[i + 1])
      requests[#requests + 1] = wrk.format()
   end
   if #requests > 1 then -- else wrk sends the one it has, without asking
      wrk.body = nil
      function request()
         at = at % #requests + 1
         return requests[at]
      end
   end
end

function done(summary, latency)
   local e = summary.errors
   print(string.format('{"requests": %d, "seconds": %.6f, "p50": %.6f, "p99": %.6f, "failed": %d, "status": %d, "timeout": %d}',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
      e.connect + e.read + e.write, e.status, e.timeout))
end
