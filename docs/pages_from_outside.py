"""A hook of mkdocs: README.md and benchmarks/README.md are pages of the site, and links to them lead there."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of docs/, and the two that stand elsewhere."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    readme = re.sub(r"\[([^\]]+)\]\(examples\)", r"\1", readme)
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text().replace("](../docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "benchmarks.md", content=benchmarks))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\]\(((?:\.\./)*)\.\./benchmarks/README\.md", r"](\1benchmarks.md", markdown)
