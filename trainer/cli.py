"""The `altmoe` command: encode, train, evaluate, search, publish, push. Errors for users are one sentence."""

import argparse
import importlib
import sys

COMMANDS = {
    "encode": "run every item of a data set through a frozen encoder, once, into a LatentStore",
    "import": "make a LatentStore of vectors you have: a file, a FAISS index, a data set, a database table",
    "store": "look at a LatentStore, delete rows by id, compact it",
    "train": "train a connector on stored latents (a recipe and flags)",
    "evaluate": "measure a trained connector on held-out pairs, beside simpler methods",
    "index": "make a search index once and keep it beside its store, or fill a database",
    "search": "search a LatentStore with a text, a picture or a sound",
    "serve": "answer searches over HTTP",
    "publish": "write a folder that is ready for the Hub: weights, code, card, examples",
    "push": "send a published model, a LatentStore or a search page to the Hub",
}
PLACES = {  # of the commands that read their arguments with argparse
    "import": "trainer.importing",
    "index": "trainer.index",
    "push": "trainer.push",
    "search": "trainer.search",
    "serve": "serving.serve",
    "store": "trainer.store",
}
USAGE = "usage: altmoe COMMAND ...\n\n" + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())


def _dataclass_command(name: str, rest: list[str]) -> None:
    from transformers import HfArgumentParser

    from trainer import encode, evaluate, publish

    kinds = {
        "encode": (encode.EncodeArguments, encode.main),
        "evaluate": (evaluate.EvaluateArguments, evaluate.main),
        "publish": (publish.PublishArguments, publish.main),
    }
    kind, run = kinds[name]
    parser = HfArgumentParser(kind, prog=f"altmoe {name}", description=COMMANDS[name], allow_abbrev=False)
    run(parser.parse_args_into_dataclasses(rest)[0])


def main(arguments: list[str] | None = None) -> None:
    """Dispatch to a command; libraries are loaded only then, so that `--help` is quick."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE + "\n\n'altmoe COMMAND --help' explains each.")
        raise SystemExit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        print(f"error: unknown command '{name}'.{hint}\n\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)
    try:
        if name == "train":
            from trainer.train import main as train

            train(rest)
        elif name in PLACES:
            command = importlib.import_module(PLACES[name])
            parser = argparse.ArgumentParser(prog=f"altmoe {name}", description=COMMANDS[name], allow_abbrev=False)
            command.add_arguments(parser)
            command.main(parser.parse_args(rest))
        else:
            _dataclass_command(name, rest)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None  # what a shell expects of Ctrl-C


if __name__ == "__main__":
    main()
