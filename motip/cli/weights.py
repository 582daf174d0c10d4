"""`motip weights`: inspect a weights file, report its transfer into a model, export it as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from motip.cli import options

app = typer.Typer(no_args_is_help=True, help="Inspect, transfer and export weights.")


@app.command("inspect")
def inspect_weights(
    path: Annotated[str, typer.Argument(help="A .pth or .safetensors file, or an export folder.")],
    json: options.Json = False,
) -> None:
    """Describe a weights file: kind, classes, architecture, training, parent.

    Example: motip weights inspect pretrains/motip_dancetrack.pth
    """
    from motip.cli.console import as_json, facts, note
    from motip.weights import inspection

    found = inspection.inspect_weights(path)
    if json:
        as_json(found)
        return
    training, parent = found["training"], found["parent"] or {}
    facts(
        [
            ("file", found["path"]),
            ("kind", f"{found['kind']}, {found['bytes'] / 1e6:.1f} MB, sha256 {found['sha256']}"),
            ("classes", f"{', '.join(found['classes'] or ['not named'])} ({found['classes_from']})"),
            ("class rows", found["class_rows"]),
            ("ID labels", found["vocabulary"]),
            ("REL_PE_LENGTH", found["rel_pe_length"]),
            ("architecture", f"{_short(found['architecture'])} (from the {found['architecture_from']})"),
            ("trained", ", ".join(f"{key} {value}" for key, value in training.items()) or None),
            ("parent", ", ".join(f"{key} {value}" for key, value in parent.items() if value) or None),
            ("tensors", f"{found['tensors']} names, {found['distinct_tensors']} tensors, {', '.join(found['dtypes'])}"),
            ("also contains", ", ".join(name for name in found["holds"] if name != "model") or None),
        ]
    )
    for text in found["notes"]:
        note(text)
    print(f"{found['parameters']:,} parameters in {found['path']}")


@app.command("transfer")
def transfer(
    path: Annotated[str, typer.Argument(help="Weights to start from.")],
    config: Annotated[str, typer.Option(help="Configuration of the model that starts from them.")],
    classes: Annotated[
        str | None, typer.Option(help="Class names of the file, comma-separated, if the file does not name them.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Name or pattern of tensors that may differ; repeatable."),
    ] = None,
    overrides: options.Overrides = None,
    output: Annotated[
        str | None, typer.Option(help="Write the transferred weights as a checkpoint of the configuration.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every tensor.")] = False,
    json: options.Json = False,
) -> None:
    """Report the status of every tensor when a model of CONFIG starts from these weights.

    Example: motip weights transfer pretrains/motip_dancetrack.pth --config
    configs/pretrain_r50_deformable_detr_bdd_mini.yaml
    """
    from motip.cli.console import as_json
    from motip.config import load_config
    from motip.model import ModelSpec
    from motip.weights import apply_transfer, plan_transfer, read_weights, save_checkpoint

    settings = load_config(config, overrides or [])
    named = None if classes is None else tuple(options.names_in(classes))
    weights = read_weights(path, classes=named or settings.PRETRAIN_CLASSES)
    names = settings.class_names
    # Plan the transfer.
    plan = plan_transfer(
        weights,
        ModelSpec.from_config(settings),
        names,
        new_class_from=settings.CLASS_INIT,
        allow=[*settings.PRETRAIN_ALLOW, *(allow or [])],
        skip=settings.PRETRAIN_SKIP,
    )
    report = plan.report
    # Apply it to a fresh model and write that.
    if output is not None:
        from motip.train.setup import fresh_model

        model = fresh_model(settings)
        apply_transfer(model, plan)
        parent = {"path": path, "sha256": weights.sha256, "run_id": None}
        save_checkpoint(output, model=model, classes=names, config=settings.to_dict(), epoch=-1, step=0, parent=parent)
    # Print the report.
    if json:
        as_json(report.to_dict())
        return
    print(report.table())
    if verbose:
        for side, statuses in (("file", report.file_status), ("model", report.model_status)):
            print(f"\nevery tensor of the {side}")
            for key, status in statuses.items():
                print(f"  {status.category:<26}{key}  {list(status.shape)}{_detail(status)}")
    print(f"\n{report.summary_line()}")
    if output is not None:
        print(f"written to {output}")


@app.command("export")
def export(
    path: Annotated[str, typer.Argument(help="A checkpoint.")],
    out_dir: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder for model.safetensors and config.json, or NAME.safetensors.")
    ],
    config: Annotated[
        str | None,
        typer.Option(help="Configuration; required for published checkpoints with a non-default architecture."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the stored floats: float16 or bfloat16 (default: unchanged).")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Storage with the run of the checkpoint (default: the one that contains the checkpoint)."),
    ] = None,
) -> None:
    """Write weights as safetensors with everything needed for tracking, and their lineage record.

    Example: motip weights export checkpoint_best.pth exported/
    """
    import torch

    from motip.cli.console import note
    from motip.config import load_config
    from motip.lineage.export_record import write_export_record
    from motip.weights.export import export_safetensors

    types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is not None:
        options.check_known("unknown type", "--dtype", dtype, list(types))
    settings = None if config is None else load_config(config)
    written = export_safetensors(path, out_dir, config=settings, dtype=types[dtype] if dtype else None)
    record, steps = write_export_record(path, written, storage, dtype)
    print(f"lineage: {record.name} in the same folder, {len(steps)} steps: {' -> '.join(step.stage for step in steps)}")
    for step in steps:
        if step.note:
            note(f"{step.stage}: {step.note}")
    config_json = "" if written.parent != Path(out_dir) else " and config.json in the same folder"
    print(f"written: {written} ({written.stat().st_size / 1e6:.1f} MB){config_json}")


def _short(architecture: dict[str, Any]) -> str:
    names = ("backbone", "enc_layers", "dec_layers", "hidden_dim", "num_queries", "num_id_decoder_layers")
    return ", ".join(f"{name} {architecture[name]}" for name in names if name in architecture)


def _detail(fate: Any) -> str:
    parts = [fate.detail, f"second name of {fate.alias_of}" if fate.alias_of else ""]
    return "".join(f"  {part}" for part in parts if part)
