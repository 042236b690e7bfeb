#!/usr/bin/env python3
"""plot.py RESULTS.json [OUT.svg] - the results of compare.sh (its OUT) as bars: the time of each tool over that of mirrorfs sync.

One panel for each workload and file system, medians, whiskers from the fastest to the slowest round; beside each tool what it
loses of a tree with everything in it. Bars end at CUT times ours; the number tells how long they are. Plain SVG, no library:
a card with a background of its own, so that it can be read on light and dark pages.
"""
import json
import statistics
import sys
from html import escape

CUT = 5.0                                   # times ours
COLUMN, GAP, ROW, HEAD = 560, 24, 19, 30    # px
LABEL, BAR, NUMBER = 96, 210, 46
OURS = 'mirrorfs sync'
STYLE = '''
 text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
 .card { fill: #ffffff; stroke: #d1d9e0 } .title { font-size: 17px; font-weight: 600 } .head { font-weight: 600 } .ours { font-weight: 600 }
 .note, .small { font-size: 10.5px; fill: #59636e } .full { fill: #57727f } .lossy { fill: #b9a27a } .mine { fill: #1a7f64 }
 .unit { stroke: #8c959f; stroke-dasharray: 2 3 } .whisker { stroke: #1f2328; stroke-width: 1.2 } .break { stroke: #ffffff; stroke-width: 3 }
 @media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .card { fill: #0d1117; stroke: #30363d } .note, .small { fill: #9198a1 }
  .full { fill: #7b97a5 } .lossy { fill: #8d7746 } .mine { fill: #3fb68b } .unit { stroke: #656d76 }
  .whisker { stroke: #e6edf3 } .break { stroke: #0d1117 }
 }
'''
WORDS = {
    'small': 'small files', 'tiny': 'tiny files in 20 directories', 'links': 'hard links', 'large': 'large files', 'sparse': 'a sparse file',
    'cold': 'small files, nothing cached', 'slow1': 'a source of 1 ms for each request', 'slow5': 'a source of 5 ms for each request',
    'same': 'large files, one file system', 'shared': 'large files, shared extents',
}


def panels(rows):
    """[(workload, fs, {tool: row})] in the order of the file, of those where we are among the tools."""
    found = {}
    for row in rows:
        found.setdefault((row['workload'], row['fs']), {})[row['tool']] = row
    return [(*key, tools) for key, tools in found.items() if OURS in tools]


def text(x, y, words, kind='', anchor='start'):
    return '<text x="%.1f" y="%.1f" class="%s" text-anchor="%s">%s</text>' % (x, y, kind, anchor, escape(words))


def short(losses, room):
    """As many of the words as fit."""
    if losses in (None, 'nothing', '?'):
        return {'nothing': 'keeps everything'}.get(losses, '')
    words, said = losses.split(', '), 'loses '
    for i, word in enumerate(words):
        more = ' +%d' % (len(words) - i)
        if len(said) + len(word) + len(more) > room:
            return said.rstrip(', ') + more
        said += word + ', '
    return said.rstrip(', ')


def bar(x, y, ours, tool, row):
    mid = statistics.median(row['clock_s']) / ours
    low, high = min(row['clock_s']) / ours, max(row['clock_s']) / ours
    failed = any(row.get('exit', []))
    at = lambda ratio: x + LABEL + BAR * min(ratio, CUT) / CUT
    kind = 'mine' if tool == OURS else 'full' if row.get('loses') == 'nothing' else 'lossy'
    out = [text(x + LABEL - 6, y + 13, tool, 'ours' if tool == OURS else '', 'end'),
           '<rect x="%.1f" y="%.1f" width="%.1f" height="%d" rx="2" class="%s"/>' % (x + LABEL, y + 3, at(mid) - x - LABEL, ROW - 6, kind)]
    if mid > CUT:
        out.append('<path d="M%.1f %.1f l5 %d" class="break"/>' % (at(CUT) - 16, y + 1, ROW - 2))
    else:
        end = 'm0 -3 v6' if high <= CUT else ''
        out.append('<path d="M%.1f %.1f H%.1f %s M%.1f %.1f v6" class="whisker" fill="none"/>' % (
            at(low), y + ROW / 2, at(high), end, at(low), y + ROW / 2 - 3))
    seconds = '%.2f s' % statistics.median(row['clock_s']) if tool == OURS else '%.2f x' % mid if mid < 10 else '%.0f x' % mid
    out.append(text(x + LABEL + BAR + NUMBER, y + 13, seconds, 'ours' if tool == OURS else '', 'end'))
    note = 'failed' if failed else short(row.get('loses'), 34)
    out.append(text(x + LABEL + BAR + NUMBER + 10, y + 13, note, 'note'))
    return out


def panel(x, y, workload, fs, tools):
    ours = statistics.median(tools[OURS]['clock_s'])
    order = sorted(tools, key=lambda t: (t != OURS, statistics.median(tools[t]['clock_s'])))
    out = [text(x + 4, y + 18, '%s, %s' % (WORDS.get(workload, workload), fs), 'head')]
    for i, tool in enumerate(order):
        out += bar(x, y + HEAD + i * ROW, ours, tool, tools[tool])
    unit = x + LABEL + BAR / CUT
    out.append('<path d="M%.1f %.1f V%.1f" class="unit"/>' % (unit, y + HEAD - 2, y + HEAD + len(order) * ROW))
    return out


def legend(right, y):
    out = []
    for kind, words in (('lossy', 'loses something'), ('full', 'keeps everything'), ('mine', OURS)):
        out.append(text(right, y, words, 'small', 'end'))
        right -= 6 * len(words) + 14
        out.append('<rect x="%d" y="%d" width="10" height="10" rx="2" class="%s"/>' % (right, y - 9, kind))
        right -= 18
    return out


def svg(rows):
    found = panels(rows)
    tall = lambda p: HEAD + len(p[2]) * ROW + 14
    columns, body = [70.0, 70.0], []
    for p in found:
        side = 0 if columns[0] <= columns[1] else 1
        body += panel(14 + side * (COLUMN + GAP), columns[side], *p)
        columns[side] += tall(p)
    width, height = 2 * COLUMN + GAP + 28, max(columns) + 12
    some = found[0][2][OURS]
    told = 'medians of %d rounds in turn, whiskers: fastest and slowest round; trees of %g times the usual size' % (some['rounds'], some['scale'])
    return '\n'.join([
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">' % (
            width, height, width, height, 'Time of whole-tree copies relative to mirrorfs sync'),
        '<style>%s</style>' % STYLE,
        '<rect x="0.5" y="0.5" width="%d" height="%d" rx="8" class="card"/>' % (width - 1, height - 1),
        text(18, 30, 'Time of a whole-tree copy over that of mirrorfs sync: shorter is better', 'title'),
        text(18, 50, told, 'small'), *legend(width - 18, 50), *body, '</svg>', ''])


def main():
    if len(sys.argv) not in (2, 3) or sys.argv[1] in ('-h', '--help'):
        sys.exit(__doc__)
    with open(sys.argv[1]) as f:
        picture = svg(json.load(f))
    with open(sys.argv[2] if len(sys.argv) > 2 else 'docs/benchmarks.svg', 'w') as f:
        f.write(picture)


if __name__ == '__main__':
    main()
