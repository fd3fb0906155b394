"""The command that serves a model over HTTP."""

import argparse
import ipaddress
import os
import signal

from llava_jax.cli.flags import announce, check_least
from llava_jax.cli.models import SOURCE, companion_flags, load, loading_flags, need_file
from llava_jax.types import InputError

KEY = "LLAVA_JAX_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def serve_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="SRC", help=SOURCE)
    companion_flags(parser)
    loading_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one (8000)")
    key = f"file with the key that clients must give; without it the key in {KEY}, if there is one"
    parser.add_argument("--api_key_file", metavar="FILE", help=key)
    insecure = "listen at an address that other machines reach without a key"
    parser.add_argument("--insecure", action="store_true", help=insecure)
    parser.add_argument("--slots", type=int, default=8, help="answers decoded at one time (8)")
    parser.add_argument("--waiting", type=int, default=64, help="requests that may wait for a slot; more get 429 (64)")
    length = "tokens of a prompt and its answer; the model's by default"
    parser.add_argument("--max_length", type=int, metavar="N", help=length)
    parser.add_argument("--max_images", type=int, default=8, help="images in one request (8)")
    parser.add_argument("--max_body", type=int, default=20, metavar="MB", help="megabytes of one request (20)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that an answer may take (300)")
    remote = "fetch images from http(s) addresses in requests, of the public Internet only"
    parser.add_argument("--allow_remote_images", action="store_true", help=remote)


def serve(args: argparse.Namespace) -> int:
    check_least(args, 1, "slots", "waiting", "max_length", "max_body", "timeout")
    check_least(args, 0, "max_images", "port")
    key, local = _key(args.api_key_file), _is_loopback(args.host)
    if not local and not key and not args.insecure:
        raise InputError(
            f"--host={args.host}: other machines could ask; give a key in {KEY} or --api_key_file, or --insecure"
        )
    try:
        from llava_jax.serve import server
        from llava_jax.serve.answer import Service
        from llava_jax.serve.protocol import Limits
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs {error.name}: pip install 'llava-jax[serve]'") from None

    from llava_jax.infer.engine import Engine

    bound = server.bind(args.host, args.port)
    announce(
        "serve",
        model=args.model,
        template=args.template,
        address=f"{args.host} port {bound.getsockname()[1]}",
        key="asked of every client" if key else "none",
        slots=f"{args.slots}, and {args.waiting} requests waiting",
        images="data: URLs" + (", and http(s) addresses" if args.allow_remote_images else ""),
        timeout=f"{args.timeout:g} s",
    )
    model = load(args)
    engine = Engine(model, slots=args.slots, max_length=args.max_length, waiting=args.waiting)
    limits = Limits(engine.max_length, body=args.max_body * 1_000_000, images=args.max_images)
    # Without a key, a page of another site must not get in under a name of its own for this machine.
    hosts = (args.host, *LOOPBACK) if local and not key else ()
    service = Service(
        model.name, engine, model.processor, limits, key, hosts, args.allow_remote_images, timeout=args.timeout
    )
    server.warm_up(service)
    run = server.make_server(service)

    def stop(*_: object) -> None:
        run.should_exit = True

    # uvicorn has a handler of its own while it runs, and sends the signal once more when it has ended well.
    signal.signal(signal.SIGTERM, stop)
    bound.listen()
    print(f"model {service.name} at http://{_url_host(args.host)}:{bound.getsockname()[1]}", flush=True)
    run.run(sockets=[bound])
    return 0


def _key(path: str | None) -> str:
    need_file("--api_key_file", path)
    key, where = os.environ.get(KEY, "").strip(), KEY
    if path is not None:
        where = f"--api_key_file={path}"
        with open(path, encoding="utf-8", errors="replace") as file:
            key = file.read().strip()
        if not key:
            raise InputError(f"{where}: is empty; expected the key")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{where}: the key holds a letter that no client can send; expected printable ASCII")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
