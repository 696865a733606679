"""For mkdocs: benchmarks/README.md is a page of the site too, and links to it and out of it lead there."""

from mkdocs.structure.files import File


def on_files(files, config):
    with open("benchmarks/README.md", encoding="utf-8") as file:
        files.append(File.generated(config, "benchmarks.md", content=file.read()))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri == "benchmarks.md":
        return markdown.replace("](../docs/", "](")
    return markdown.replace("](../benchmarks/README.md", "](benchmarks.md").replace("](../../benchmarks/README.md", "](../benchmarks.md")
