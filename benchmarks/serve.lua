-- For wrk: send the bodies of a folder one after the other, over and over, and print what was measured as one line of JSON.
-- Arguments: folder, number of bodies (files 0, 1, ...), content type.

local bodies, turn = {}, 0

function init(arguments)
   for number = 0, tonumber(arguments[2]) - 1 do
      local file = assert(io.open(arguments[1] .. "/" .. number, "rb"))
      bodies[number] = wrk.format("POST", nil, { ["Content-Type"] = arguments[3] }, file:read("*a"))
      file:close()
   end
end

function request()
   turn = (turn + 1) % (#bodies + 1)
   return bodies[turn]
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      '{"requests": %d, "seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f, "errors": %d}\n',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      latency.max / 1e3, errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
