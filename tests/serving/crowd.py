"""A crowd of clients in a process of its own, so that the server is measured: `crowd.py PORT CLIENTS SECONDS`."""

import asyncio
import json
import sys
import time

BODY = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


async def visit(port: int, end: float, seen: list[tuple[int, float]]) -> None:
    while time.monotonic() < end:
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        answered = await reader.read()
        writer.close()
        status = int(answered[9:12])
        json.loads(answered.partition(b"\r\n\r\n")[2])
        seen.append((status, time.monotonic() - started))
        if status == 429:
            await asyncio.sleep(0.5)


async def main(port: int, clients: int, seconds: float) -> None:
    seen: list[tuple[int, float]] = []
    async with asyncio.timeout(seconds + 120):
        await asyncio.gather(*(visit(port, time.monotonic() + seconds, seen) for _ in range(clients)))
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
