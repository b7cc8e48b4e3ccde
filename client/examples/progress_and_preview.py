"""Follow an edit: progress of each phase, a preview every five steps, and the mask that DiffEdit computed."""

from pathlib import Path

from sample import SOURCE_PROMPT, TARGET_PROMPT, flags, red_circle
from underpaint import Client, DiffEdit, Preview, Progress


def on_progress(progress: Progress) -> None:
    """Print one line; some progress is skipped when this function is slow."""
    eta = "" if progress.eta_s is None else f", {progress.eta_s:.1f} s left"
    print(f"{progress.fraction:4.0%} {progress.phase} {progress.step}/{progress.total_steps}{eta}")


def main() -> None:
    """Edit with DiffEdit and write result, mask and previews."""
    options = flags(__doc__, "progress_and_preview").parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)

    def on_preview(preview: Preview) -> None:
        (folder / f"step-{preview.step:03}.jpg").write_bytes(preview.image_bytes)

    with Client(options.target) as client:
        result = client.edit(
            red_circle(),
            TARGET_PROMPT,
            DiffEdit(reference_prompt=SOURCE_PROMPT, steps=20, samples=4),
            seed=1,
            progress=on_progress,
            on_preview=on_preview,
            preview_every=5,
        )
        repeated = client.repeat(result.resolved)
    result.save(folder / "result.png")
    if result.mask is not None:
        result.mask.save(folder / "mask.png")
    (folder / "resolved.json").write_text(result.resolved.to_json())
    same = repeated.image_bytes == result.image_bytes
    print(f"written to {folder}; the repeated edit has {'the same' if same else 'other'} bytes")


if __name__ == "__main__":
    main()
