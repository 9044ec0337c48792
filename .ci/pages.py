"Build every page without Quarto: nbdev processes the notebooks, nbconvert makes HTML, sidebar and links are compared with the files."
import re, sys, tempfile
from html import unescape
from pathlib import Path
from urllib.parse import unquote
from book import nbs, notebooks, root, finish

def entries(node):
    "Every path and glob in the sidebar or navbar."
    if isinstance(node, str): yield node
    if isinstance(node, list):
        for n in node: yield from entries(n)
    if isinstance(node, dict):
        for key in 'contents', 'href', 'left', 'right': yield from entries(node.get(key))

def sidebar(quarto):
    "Sidebar entries without a file, and notebooks without an entry."
    listed = set()
    for entry in entries([quarto['website']['sidebar'], quarto['website'].get('navbar', {})]):
        if re.match(r'https?:', entry): continue
        found = list(root.glob(entry)) if '*' in entry else [root/entry] if (root/entry).exists() else []
        if not found and '*' not in entry: yield f'_quarto.yml: no file for `{entry}`'
        listed |= set(found)
    css = quarto['format']['html'].get('css', [])
    yield from (f'_quarto.yml: no file for `{c}`' for c in ([css] if isinstance(css, str) else css) if not (root/c).exists())
    yield from (f'{nb.relative_to(root)} is not in the sidebar' for nb in notebooks(reports=True) if nb not in listed)

def links(nb, html):
    "Local links and pictures of a page that lead nowhere."
    for target in set(re.findall(r'<(?:a|img)\b[^>]*?\s(?:href|src)="([^"]+)"', html)):
        path = unquote(unescape(target)).partition('#')[0].partition('?')[0]
        if not path or re.match(r'[a-zA-Z][\w+.-]*:|//', path): continue
        base = root if path.startswith('/') else nb.parent
        full = base/path.lstrip('/')
        if not (full.exists() or full.with_suffix('.ipynb').exists()): yield f'{nb.relative_to(root)}: no file for the link `{target}`'

def main():
    import yaml
    from nbconvert import HTMLExporter
    from nbdev.serve import proc_nbs
    bad = list(sidebar(yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))))
    cache = proc_nbs(root, n_workers=2, force=True)
    exporter, pages = HTMLExporter(), 0
    with tempfile.TemporaryDirectory() as out:
        for nb in notebooks(reports=True):
            page = cache/nb.relative_to(root)
            if not page.exists(): bad.append(f'{nb.relative_to(root)}: nbdev made no page'); continue
            html, _ = exporter.from_filename(str(page))
            (Path(out)/f'{nb.stem}.html').write_text(html, encoding='utf-8')
            bad += links(nb, html)
            pages += 1
    finish(bad, f'{pages} pages built, sidebar and links lead somewhere')

if __name__ == '__main__': main()
