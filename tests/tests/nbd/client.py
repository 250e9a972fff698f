"""What a client of the NBD export sees: every command and every edge, by libnbd and by hand.

client.py commands URI          a writable, empty disk of 64 MiB: commands, flags and limits
client.py readonly URI          a disk that refuses writes
client.py raw SOCKET NAME       what no client library sends
client.py leave URI             goes away with 64 requests under way
client.py hold URI              prints the size, waits for a line, and reads the last byte and the one behind it
client.py read URI              reads one page; prints its sum, or the name of the error
client.py readwrite URI         writes and reads of all sizes, and 256 reads at a time
client.py durable URI           writes on one connection, flushes on another, and writes with FUA

Prints what it did, line by line, and ends with status 1 where something is not as it must be.
"""

import socket
import struct
import sys

import nbd

MIB = 1 << 20
REQUEST = 0x25609513


def connect(uri, structured=True, strict=False):
    client = nbd.NBD()
    client.set_request_structured_replies(structured)
    if structured:
        client.add_meta_context("base:allocation")
    if not strict:
        # The server is to be asked, not the library.
        client.set_strict_mode(0)
    # Certificates of an nbds URI.
    client.set_uri_allow_local_file(True)
    client.connect_uri(uri)
    return client


def refused(errno, what, call, *arguments, **more):
    """The call must fail with this error, and the connection must live on."""
    try:
        call(*arguments, **more)
    except nbd.Error as error:
        assert error.errno == errno, f"{what}: {error.errno} ({error.string}), not {errno}"
        print(f"{what}: {errno}")
        return
    raise AssertionError(f"{what}: was not refused")


def extents(client, length, offset, flags=0):
    found = []

    def seen(context, at, entries, error):
        assert context == "base:allocation" and at == offset, (context, at)
        found.extend(zip(entries[0::2], entries[1::2]))

    client.block_status(length, offset, seen, flags)
    return found


def commands(uri):
    for structured in (True, False):
        client = connect(uri, structured)
        size = client.get_size()
        assert size == 64 * MIB, size
        assert client.get_structured_replies_negotiated() == structured
        assert client.can_meta_context("base:allocation") == structured
        for can in ("can_multi_conn", "can_fua", "can_flush", "can_trim", "can_zero", "can_cache"):
            assert getattr(client, can)(), can
        assert not client.is_read_only() and client.can_df() == structured
        block = [client.get_block_size(kind) for kind in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
        assert block == [1, 4096, 32 * MIB], block

        # Reads and writes of any bytes, aligned or not, and across blocks.
        data = bytes(range(256)) * 1024
        for offset, length in ((0, 4096), (1, 1), (511, 2), (4095, 8194), (65535, 65538), (3, 200001), (size - 1, 1)):
            client.pwrite(data[:length], offset)
            assert client.pread(length, offset) == data[:length], (offset, length)
        client.pwrite(b"\x11" * 16384, 12 * MIB)
        client.pwrite(b"\x22" * 5, 12 * MIB + 4093)
        expected = b"\x11" * 4093 + b"\x22" * 5 + b"\x11" * (16384 - 4098)
        assert client.pread(16384, 12 * MIB) == expected, "a write of some bytes changes no others"
        print("reads and writes of any bytes")
        if structured:
            assert client.pread(65536, 0, flags=nbd.CMD_FLAG_DF) == client.pread(65536, 0)
            pieces = []
            client.pread_structured(8192, 4096, lambda data, at, status, error: pieces.append((at, len(data))))
            assert pieces == [(4096, 8192)], pieces
            print("unfragmented reads")

        # The largest there is, and what is larger.
        large = bytearray(b"\x77" * (32 * MIB))
        client.pwrite(large, 16 * MIB)
        assert client.pread(32 * MIB, 16 * MIB) == large
        refused("EOVERFLOW" if structured else "EINVAL", "read of 33 MiB", client.pread, 33 * MIB, 0)
        refused("EINVAL", "write of 33 MiB", client.pwrite, bytearray(33 * MIB), 0)
        assert client.pread(1, 16 * MIB) == b"\x77", "the connection goes on behind a refused payload"

        # Nothing at all.
        assert client.pread(0, 0) == b"" and client.pread(0, size) == b""
        client.pwrite(b"", 0)
        client.trim(0, 0)
        client.zero(0, 0)
        client.cache(0, 0)
        print("zero length")

        # The last byte and beyond.
        client.pwrite(b"Z", size - 1, flags=nbd.CMD_FLAG_FUA)
        assert client.pread(1, size - 1) == b"Z"
        for offset, length in ((size, 1), (size - 1, 2), (size + MIB, 512), (2**63, 512), (2**64 - 1, 1)):
            where = f"{length} bytes at {offset}"
            refused("EINVAL", f"read of {where}", client.pread, length, offset)
            refused("ENOSPC", f"write of {where}", client.pwrite, bytes(length), offset)
            refused("ENOSPC", f"zeroes of {where}", client.zero, length, offset)
            refused("EINVAL", f"trim of {where}", client.trim, length, offset)
            refused("EINVAL", f"cache of {where}", client.cache, length, offset)
            if structured:
                refused("EINVAL", f"status of {where}", client.block_status, length, offset, lambda *_: 0)
        refused("EINVAL", "read with a flag of zeroes", client.pread, 512, 0, flags=nbd.CMD_FLAG_NO_HOLE)

        # Zeroes and trims, with every flag.
        for flags in (0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA):
            client.pwrite(b"\x55" * 3 * 65536, 8 * MIB)
            client.zero(65536 + 7, 8 * MIB + 65530, flags=flags)
            got = client.pread(3 * 65536, 8 * MIB)
            assert got == b"\x55" * 65530 + bytes(65543) + b"\x55" * (3 * 65536 - 65530 - 65543), flags
        refused("EINVAL", "fast zeroes", client.zero, 512, 0, flags=nbd.CMD_FLAG_FAST_ZERO)
        client.pwrite(b"\x55" * MIB, 8 * MIB, flags=nbd.CMD_FLAG_FUA)
        client.trim(MIB, 8 * MIB, flags=nbd.CMD_FLAG_FUA)
        client.cache(4 * MIB, 0)
        client.flush()
        print("zeroes, trim, cache, flush, FUA")

        # What is allocated.
        if structured:
            client.zero(64 * MIB, 0)
            client.pwrite(b"\x01" * 65536, MIB)
            found = extents(client, 4 * MIB, 0)
            assert found == [(MIB, 3), (65536, 0), (3 * MIB - 65536, 3)], found
            assert extents(client, 4 * MIB, 512, nbd.CMD_FLAG_REQ_ONE) == [(MIB - 512, 3)]
            assert extents(client, 512, MIB) == [(512, 0)]
            refused("EINVAL", "status of nothing", client.block_status, 0, 0, lambda *_: 0)
            print("block status")
        else:
            refused("EINVAL", "status that was not agreed on", send_status, uri)

        # Many at a time, answered in any order.
        client.pwrite(b"".join(struct.pack(">Q", at) * 512 for at in range(0, MIB, 4096)), 0)
        buffers = [nbd.Buffer(4096) for _ in range(256)]
        cookies = [client.aio_pread(buffer, at * 4096) for at, buffer in enumerate(buffers)]
        while client.aio_in_flight() > 0:
            client.poll(-1)
        for at, (buffer, cookie) in enumerate(zip(buffers, cookies)):
            assert client.aio_command_completed(cookie)
            assert buffer.to_bytearray() == struct.pack(">Q", at * 4096) * 512, at
        print("256 reads at a time")
        client.shutdown()


def send_status(uri):
    """libnbd does not send one without the context."""
    raw = Raw.of(uri)
    raw.go(b"")
    raw.request(7, 0, 1, 0, 512)
    raise nbd.Error("refused", raw.simple_reply(1))


def readonly(uri):
    client = connect(uri)
    assert client.is_read_only() and not client.can_trim() and not client.can_zero()
    assert client.pread(512, 0) == bytes(512)
    refused("EPERM", "write", client.pwrite, b"\x01" * 512, 0)
    refused("EPERM", "zeroes", client.zero, 512, 0)
    refused("EPERM", "trim", client.trim, 512, 0)
    client.flush()
    client.cache(512, 0)
    assert client.pread(512, 0) == bytes(512)
    client.shutdown()


class Raw:
    """A client that may say anything."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(path)
        assert self.take(18) == b"NBDMAGICIHAVEOPT\0\3"

    @staticmethod
    def of(uri):
        return Raw(uri.split("?socket=")[1])

    def take(self, length):
        got = b""
        while len(got) < length:
            more = self.socket.recv(length - len(got))
            if not more:
                raise EOFError(f"closed after {len(got)} of {length} bytes")
            got += more
        return got

    def option(self, number, data=b"", length=None):
        head = b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length)
        self.socket.sendall(head + data)

    def reply(self):
        magic, option, kind, length = struct.unpack(">QIII", self.take(20))
        assert magic == 0x3E889045565A9
        return option, kind, self.take(length)

    def go(self, name, flags=3):
        self.socket.sendall(struct.pack(">I", flags))
        self.option(7, struct.pack(">I", len(name)) + name + b"\0\0")
        while True:
            _, kind, data = self.reply()
            if kind != 3:
                return kind, data

    def request(self, kind, flags, cookie, offset, length, payload=b""):
        self.socket.sendall(struct.pack(">IHHQQI", REQUEST, flags, kind, cookie, offset, length) + payload)

    def simple_reply(self, cookie):
        magic, error, got = struct.unpack(">IIQ", self.take(16))
        assert (magic, got) == (0x67446698, cookie)
        return error

    def is_closed(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def raw(path, name):
    name = name.encode()
    ack, unsup, policy, invalid, unknown, big = 1, *(1 << 31 | n for n in (1, 2, 3, 6, 9))

    # Negotiation: what is refused, and that it goes on behind it.
    client = Raw(path)
    client.socket.sendall(struct.pack(">I", 3))
    for number, data, expected in (
        (3, b"x", invalid), (5, b"", policy), (8, b"x", invalid), (7, b"\xff" * 4, invalid), (7, b"", invalid),
        (6, struct.pack(">I", 4) + b"none\0\0", unknown), (10, struct.pack(">I", 0) + b"\0" * 4, invalid),
        (11, b"", unsup), (4, b"", unsup), (99, b"abc", unsup), (7, bytes(20000), big), (3, bytes(2 * MIB), big),
    ):
        client.option(number, data)
        option, kind, words = client.reply()
        assert (option, kind) == (number, expected), (number, hex(kind), words)
    client.option(3)
    assert client.reply()[1:] == (2, struct.pack(">I", len(name)) + name) and client.reply()[1] == ack
    client.option(2)
    assert client.reply()[1] == ack and client.is_closed()
    print("options")

    # By name, the old way, with and without zeroes behind.
    for flags, length in ((1, 134), (3, 10)):
        client = Raw(path)
        client.socket.sendall(struct.pack(">I", flags))
        client.option(1, name)
        assert struct.unpack(">QH", client.take(length)[:10])[0] == 64 * MIB
        client.request(0, 0, 5, 0, 512)
        assert client.simple_reply(5) == 0 and len(client.take(512)) == 512
        client.request(2, 0, 0, 0, 0)
        assert client.is_closed()
    client = Raw(path)
    client.socket.sendall(struct.pack(">I", 3))
    client.option(1, b"none")
    assert client.is_closed()
    print("export by name")

    # What ends a connection: unknown flags, no option, no request.
    client = Raw(path)
    client.socket.sendall(struct.pack(">I", 1 << 5))
    assert client.is_closed()
    client = Raw(path)
    client.socket.sendall(struct.pack(">I", 3) + b"GET / HTTP/1.1\r\n\r\n")
    assert client.is_closed()
    client = Raw(path)
    assert client.go(name)[0] == ack
    client.socket.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.is_closed()
    print("no NBD at all")

    # Unknown commands, and flushes with a range.
    client = Raw(path)
    client.go(b"")
    for kind in (8, 9, 77, 65535):
        client.request(kind, 0, kind, 0, 512)
        assert client.simple_reply(kind) == 22, kind
    client.request(3, 0, 1, 512, 0)
    assert client.simple_reply(1) == 22
    # A write that is refused, with 4 MiB of payload that look like requests.
    payload = struct.pack(">IHHQQI", REQUEST, 0, 2, 0, 0, 0) * (4 * MIB // 28 + 1)
    client.request(1, 1 << 9, 2, 0, 4 * MIB, payload[:4 * MIB])
    assert client.simple_reply(2) == 22
    client.request(3, 0, 3, 0, 0)
    assert client.simple_reply(3) == 0
    print("unknown commands and flags")

    # Half a header, one byte of a payload: they may stay away, and they may go.
    half = Raw(path)
    half.go(b"")
    half.socket.sendall(struct.pack(">IHH", REQUEST, 0, 0))
    payload = Raw(path)
    payload.go(b"")
    payload.request(1, 0, 1, 0, 32 * MIB, b"x")
    silent = Raw(path)
    client.request(0, 0, 4, 0, 512)
    assert client.simple_reply(4) == 0 and len(client.take(512)) == 512, "others are served meanwhile"
    half.socket.close()
    payload.socket.close()
    silent.socket.close()
    print("half-sent header and payload")

    # Header and requests byte by byte.
    slow = Raw(path)
    slow.go(b"")
    for byte in struct.pack(">IHHQQI", REQUEST, 0, 0, 6, 0, 512):
        slow.socket.sendall(bytes([byte]))
    assert slow.simple_reply(6) == 0 and len(slow.take(512)) == 512
    # Requests behind a goodbye are nobody's.
    slow.request(0, 0, 7, 0, 512)
    slow.request(2, 0, 0, 0, 0)
    slow.request(0, 0, 8, 0, 512)
    assert slow.simple_reply(7) == 0 and len(slow.take(512)) == 512 and slow.is_closed()
    print("byte by byte, and goodbye")

    # One who asks for much and reads nothing does not keep others waiting.
    greedy = Raw(path)
    greedy.go(b"")
    greedy.socket.settimeout(2)
    try:
        for cookie in range(100_000):
            greedy.request(0, 0, cookie, 0, 1 * MIB)
        raise AssertionError("3 MiB of requests for 100 GB were taken without an answer being read")
    except TimeoutError:
        print("a reader that does not read is not read from")
    client.request(0, 0, 9, 0, 512)
    assert client.simple_reply(9) == 0 and len(client.take(512)) == 512
    greedy.socket.close()


def leave(uri):
    client = connect(uri)
    for at in range(64):
        client.aio_pread(nbd.Buffer(65536), at * 65536)
    while client.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
        client.poll(-1)
    print(client.aio_in_flight())


def hold(uri):
    client = connect(uri)
    size = client.get_size()
    print(size, flush=True)
    sys.stdin.readline()
    assert len(client.pread(1, size - 1)) == 1
    refused("EINVAL", "read behind the size that was told", client.pread, 1, size)
    print(connect(uri).get_size())


def read(uri):
    try:
        print(sum(connect(uri).pread(4096, 0)))
    except nbd.Error as error:
        print(error.errno)


def readwrite(uri):
    client = connect(uri)
    data = bytearray(range(256)) * (32 * MIB // 256)
    for offset, length in ((0, 1), (1, 16384), (4095, 70000), (MIB, 32 * MIB)):
        client.pwrite(data[:length], offset)
        assert client.pread(length, offset) == data[:length], (offset, length)
    cookies = [client.aio_pread(nbd.Buffer(65536), at * 65536) for at in range(256)]
    while client.aio_in_flight() > 0:
        client.poll(-1)
    assert all(client.aio_command_completed(cookie) for cookie in cookies)
    refused("EINVAL", "read beyond the end", client.pread, 1, client.get_size())
    client.shutdown()


def durable(uri):
    writer, other = connect(uri), connect(uri)
    writer.pwrite(b"\x01" * 4096, 0)
    other.flush()
    assert other.pread(4096, 0) == b"\x01" * 4096
    other.pwrite(b"\x02" * 4096, 4096, flags=nbd.CMD_FLAG_FUA)
    assert writer.pread(4096, 4096) == b"\x02" * 4096


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
