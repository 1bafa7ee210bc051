"""The command line: each command is a thin call of the Python function of the same verb."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from meristem.errors import TRACEBACK, MeristemError, RecipeError, unforeseen

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Pretrain on unlabelled scans, fine-tune on few labels, and see whether it helped.")
data_app = typer.Typer(no_args_is_help=True, help="Look at data before using it.")
recipes_app = typer.Typer(no_args_is_help=True, help="The built-in recipes.")
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")

DATA = ("A folder, an MSD or nnU-Net dataset, boxes (COCO, Pascal VOC, MONAI, KITTI, ActivityNet), a CSV, a list of paths and "
        "labels, a MedMNIST .npz, or one file.")
DATA_OR_URL = f"{DATA} Or the URL of shards that `meristem data shard` wrote."
DataOption = Annotated[str, typer.Option("--data", help=DATA_OR_URL)]
OutOption = Annotated[Path, typer.Option("--out", help="Directory for the results.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Recipe overrides, key.sub=value.", show_default=False)]
SplitOption = Annotated[str, typer.Option(
    "--split", help="auto (the data's own, else 60/20/20 by patient), fractions such as 0.6,0.2,0.2, every:5:1 (of five "
                    "folds, 0 to 4, the one to test on), or fold:1 (of the data's own; fold:1:only validates on none).")]
CacheOption = Annotated[Path | None, typer.Option("--cache", help="Where decoded samples are kept.", show_default="user cache")]
RoomOption = Annotated[float, typer.Option("--room", min=0, help="GB of the cache for shards that are fetched from a URL.")]
Task = Annotated[str, typer.Argument(help="segmentation, classification, detection, propagation or keypoints; or a recipe "
                                          "(video/classification) or YAML file, which says what kind of data it is where the "
                                          "files do not.")]
Run = Annotated[Path, typer.Option("--checkpoint", help="A run directory.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Init = Annotated[str, typer.Option("--init", help="A pretraining run, or scratch.")]
Inits = Annotated[list[str] | None, typer.Option(
    "--init", help="A pretraining run, scratch, or metadata (what files say before any pixel); repeat for more arms.")]
Labels = Annotated[str, typer.Option("--labels", help="Labelled subjects to use: a count, a fraction, or all.")]
TrainOn = Annotated[str, typer.Option("--train-on", help="Splits to learn from: train, or train,val once all is tuned.")]
Budgets = Annotated[list[str] | None, typer.Option("--labels", help="Label budgets: counts, fractions or all; repeatable.")]
Protocols = Annotated[list[str] | None, typer.Option(
    "--protocol", help="finetune, frozen, warmup, sawtooth or lora to train on labels; attentive, linear, svm, knn, …; "
                       "default: the task's usual one; repeatable.")]


@app.command()
def pretrain(recipe: Annotated[str, typer.Argument(help="A recipe name (volume/mae) or a YAML file.")],
             data: Annotated[list[str], typer.Option("--data", help=f"{DATA_OR_URL} For joint/mae several: image=PATH, "
                                                                    "points=PATH.")],
             out: OutOption, overrides: Overrides = None, init: Init = "scratch", split: SplitOption = "auto",
             cache: CacheOption = None, room: RoomOption = 20.0, resume: Resume = False, quiet: Quiet = False) -> None:
    """Learn an encoder from unlabelled data."""
    from meristem import api
    api.pretrain(recipe, _places(data), out, overrides or (), init=init, split=split, cache=cache, room=room,
                 resume=resume, quiet=quiet)


def _places(data: list[str]) -> str | dict[str, str]:
    """One place, or a place by the name of each member of a joint recipe."""
    named = [re.fullmatch(r"([a-z]\w*)=(.+)", text) for text in data]
    if len(data) == 1 and (named[0] is None or Path(data[0]).exists()):
        return data[0]
    if not all(named) or len({m[1] for m in named if m}) < len(data):
        raise RecipeError("several --data need a name each, and each its own", "E.g. --data image=scans/ --data points=clouds/")
    return {m[1]: m[2] for m in named if m}


@app.command()
def finetune(task: Task, data: DataOption, out: OutOption, overrides: Overrides = None, init: Init = "scratch",
             labels: Labels = "all", train_on: TrainOn = "train", split: SplitOption = "auto", cache: CacheOption = None,
             room: RoomOption = 20.0, resume: Resume = False, quiet: Quiet = False) -> None:
    """Grow a task head on an encoder, with labels, and score it on held-out subjects."""
    from meristem import api
    api.finetune(task, data, out, overrides or (), init=init, labels=labels, train_on=train_on.split(","), split=split,
                 cache=cache, room=room, resume=resume, quiet=quiet)


@app.command()
def evaluate(task: Task, data: DataOption, out: OutOption, overrides: Overrides = None, init: Inits = None,
             labels: Budgets = None,
             seeds: Annotated[int, typer.Option(min=1, help="Seeds per cell: label draw and training.")] = 3,
             protocol: Protocols = None, split: SplitOption = "auto", cache: CacheOption = None, room: RoomOption = 20.0,
             jobs: Annotated[int | None, typer.Option(min=1, help="Processes that share the grid.",
                                                      show_default="one for each GPU")] = None, quiet: Quiet = False) -> None:
    """Compare encoders at several label budgets; write the transfer report. An interrupted grid goes on where it stopped."""
    from meristem import api
    page = api.evaluate(task, data, out, overrides or (), inits=init or ["scratch"], labels=labels or ["all"], seeds=seeds,
                        protocols=protocol or (), split=split, cache=cache, room=room, jobs=jobs, quiet=quiet)
    if not quiet:
        print(page)


@app.command()
def report(directories: Annotated[list[Path], typer.Argument(help="Directories that evaluate wrote.")],
           out: Annotated[Path | None, typer.Option(help="For the page.", show_default="first directory")] = None,
           folds: Annotated[bool, typer.Option("--folds", help="They are folds (--split every:5:0 …) of one evaluation: pool "
                                               "them; wants --out.")] = False,
           against: Annotated[Path | None, typer.Option("--against", help="An earlier report: tell what changed since."
                                                        )] = None) -> None:
    """Draw the transfer report of one evaluation, or of several together, or the difference to an earlier one."""
    from meristem import api
    print(api.report(directories, out, folds=folds, against=against))


@app.command()
def predict(checkpoint: Run, data: DataOption, out: OutOption, quiet: Quiet = False) -> None:
    """Predict every sample of a folder; label maps come back on the source grid, boxes in its coordinates.

    Of a DICOM series both a NIfTI file and a DICOM SEG are written; the SEG names the patient, as the archive needs it.
    """
    from meristem import api
    api.predict(checkpoint, data, out, quiet=quiet)


@app.command()
def embed(checkpoint: Run, data: DataOption, out: OutOption, quiet: Quiet = False) -> None:
    """Write one vector per sample."""
    from meristem import api
    path = api.embed(checkpoint, data, out, quiet=quiet)
    if not quiet:
        print(path)


class _Bare(typer.core.TyperCommand):
    """`--sweep` alone means all that can be swept."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        for word, after in zip(args, [*args[1:], ""], strict=True):
            words += [word, "all"] if word == "--sweep" and not re.fullmatch("[a-z]+", after) else [word]
        return super().parse_args(ctx, words)


@app.command(cls=_Bare)
def bench(recipe: Annotated[str, typer.Argument(help="A recipe name (volume/mae) or a YAML file.")],
          data: Annotated[str | None, typer.Option("--data", help=DATA_OR_URL,
                                                   show_default="only what is swept is measured")] = None,
          overrides: Overrides = None,
          steps: Annotated[int, typer.Option("--steps", min=3, help="Of each measurement; fewer where they are slow.")] = 20,
          sweep: Annotated[list[str] | None, typer.Option(
              "--sweep", help="Grow made input by size, frames, points, nodes or batch, as the data has them; repeatable; "
                              "alone: by all.", show_default=False)] = None,
          out: Annotated[Path | None, typer.Option("--out", help="Directory for bench.html, bench.json and the figures.",
                                                   show_default="none is written")] = None,
          split: SplitOption = "auto", cache: CacheOption = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Measure what a recipe costs on this machine and data, what bounds it, and what to set before a long run."""
    from meristem import api
    made = api.bench(recipe, data, overrides or (), steps=steps, sweep=sweep or (), out=out, split=split, cache=cache,
                     quiet=quiet or as_json)
    if as_json:
        print(json.dumps(made.dump(), indent=1))
    elif not quiet:
        from meristem.platform.report.bench import show
        show(made, Console())


@data_app.command("check")
def data_check(path: Annotated[Path, typer.Argument(help=DATA)], as_json: Json = False,
               out: Annotated[Path | None, typer.Option("--out", help="Directory for check.html and check.json.",
                                                        show_default="none is written")] = None,
               modality: Annotated[str | None, typer.Option(help="volume, image, video, …", show_default="guessed")] = None,
               names: Annotated[bool, typer.Option("--names", help="Show the files' own names too, here only.")] = False,
               quiet: Quiet = False) -> None:
    """Read every file; tell what is in them, what is wrong and what is doubtful. Exits with 1 when a file would be refused."""
    from meristem import api
    found = api.check_data(path, modality, out, quiet=quiet or as_json)
    if as_json:
        print(json.dumps(found.dump(), indent=1))
    elif not quiet:
        from meristem.platform.report.intake import show
        show(found, Console(), found.local if names else {})
    if not found.ok:
        raise typer.Exit(1)


@data_app.command("shard")
def data_shard(path: Annotated[Path, typer.Argument(help=DATA)],
               out: Annotated[str, typer.Option("--out", help="s3://bucket/folder, gs://…, file:///…, or another URL that "
                                                              "fsspec can write to.")],
               overrides: Overrides = None,
               recipe: Annotated[str | None, typer.Option(help="Decode as this recipe wants it.",
                                                          show_default="the base of the data's kind")] = None,
               size: Annotated[float, typer.Option(min=0.001, help="MB of a shard.")] = 256.0, cache: CacheOption = None,
               workers: Annotated[int, typer.Option(min=0, help="Processes that decode; 0: this one.")] = 0,
               quiet: Quiet = False) -> None:
    """Write the decoded samples as shards, to train on data that no local disk holds. A stopped call goes on where it was."""
    from meristem import api
    from meristem.platform.data.shards.remote import masked
    done = api.shard_data(path, out, overrides or (), recipe=recipe, size=size, cache=cache, workers=workers, quiet=quiet)
    if not quiet:
        lost = f", {len(done.problems)} files cannot be used (`meristem data check` says why)" if done.problems else ""
        there = f" ({done.reused} were there)" if done.reused else ""
        megabytes = sum(shard.size for shard in done.shards) / 1e6
        print(f"{len(done.lines):,} samples in {len(done.shards):,} shards{there}, {megabytes:,.1f} MB, at {masked(out)}{lost}")


@app.command()
def export(checkpoint: Run, out: Annotated[Path, typer.Option("--out", help="A new folder.")],
           form: Annotated[str, typer.Option("--format", help="torch, onnx, timm or monai.")] = "torch",
           size: Annotated[str | None, typer.Option("--size", help="Of the arrays, e.g. 96,96,96.",
                                                    show_default="of the recipe's first view")] = None) -> None:
    """Write a run's encoder for other programs to use."""
    from meristem import api
    if size is not None and not re.fullmatch(r"\d+(,\d+)*", size):
        raise RecipeError(f"'{size}' is no size", "Write whole numbers with commas, e.g. --size 96,96,96.")
    print(api.export(checkpoint, out, form, None if size is None else [int(n) for n in size.split(",")]))


@app.command()
def adopt(weights: Annotated[Path, typer.Option("--weights", help="A .safetensors file or a state dict that torch saved.")],
          modality: Annotated[str, typer.Option("--modality", help="image, volume, …")], out: OutOption,
          overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Make weights of timm, MONAI or elsewhere a run, to fine-tune, evaluate and export like any other."""
    from meristem import api
    report = api.adopt(weights, modality, out, overrides or ())
    if not quiet:
        print(report.line())


@recipes_app.command("list")
def recipes_list(modality: Annotated[str | None, typer.Option("--modality", help="Of one kind of data.")] = None,
                 family: Annotated[str | None, typer.Option("--family", help="masked, contrastive, pretext, …")] = None,
                 status: Annotated[str | None, typer.Option("--status", help="verified, tested or expressible.")] = None,
                 as_json: Json = False) -> None:
    """All built-in recipes by modality, family (which engines they use) and status (what was shown of them)."""
    from meristem import catalogue
    rows = catalogue.rows()
    for key, wanted in (("modality", modality), ("family", family), ("status", status)):
        known = sorted({part for row in rows for part in row[key].split(" + ")})
        if wanted is not None and wanted not in known:
            raise RecipeError(f"no recipe has {key} '{wanted}'", f"Choose of {', '.join(known)}.")
        rows = [row for row in rows if wanted is None or wanted in row[key].split(" + ")]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None)
    for column in ("recipe", "family", "status", "follows"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], row["family"], row["status"], row["follows"])
    Console().print(table)


@recipes_app.command("show")
def recipes_show(name: str, overrides: Overrides = None, as_json: Json = False) -> None:
    """A recipe with every key resolved, and the passes that one step makes."""
    from meristem import api
    shown = api.show_recipe(name, overrides or ())
    if as_json:
        print(json.dumps(shown, indent=1))
        return
    import yaml
    print(yaml.safe_dump(shown["recipe"], sort_keys=False, allow_unicode=True).rstrip())
    print(f"\n# hash {shown['hash']}, {shown['parameters']:,} parameters")
    print("# passes of one step:" if shown["passes"] else "# trains nothing")
    for line in shown["passes"]:
        print(f"#   {line}")


def _argument(filename: str | bytes) -> str:
    """What in the arguments of this call a file belongs to, the longest place first; names of data files are not repeated."""
    file = Path(os.fsdecode(filename)).resolve()
    given = [(Path(value).resolve(), argument) for argument in sys.argv[1:]
             for value in [argument.partition("=")[2] or argument]]
    near = [(len(place.parts), place, argument) for place, argument in given if file == place or file.is_relative_to(place)]
    if not near:
        return "a file"
    _, place, argument = max(near)
    return argument if file == place else f"a file in {argument}"


def main() -> None:
    """Entry point: a user's mistake is a message and exit status 2, anything else one that quotes no file, and 1."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        app()
    except MeristemError as error:
        print(f"meristem: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not isinstance(error, OSError) or error.filename is None or os.environ.get(TRACEBACK):
            print(f"meristem: {unforeseen(error)}", file=sys.stderr)
            sys.exit(1)
        print(f"meristem: {_argument(error.filename)}: {error.strerror}\n  Give another place, or make this one usable.",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
