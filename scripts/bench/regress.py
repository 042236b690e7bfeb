#!/usr/bin/env python3
"""regress.py compare|write SUMMARIES BASELINE [LIMIT] - instruction counts against those in the repository.

SUMMARIES is the directory where gungraun left its summary.json files, of one run or of several below it: a
baseline is their median, and the least of them is compared, since what is really dearer is so in each.
BASELINE is benches/baseline.json. `compare` exits with 1 when a bench takes more than LIMIT percent (3) more
than it did, or is missing, and with 3 when the counts are of another compiler or C library and cannot be
compared; `write` makes the baseline anew.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path


def machine():
    """What the counts depend on besides our own code: memcpy and the code that rustc makes."""
    rustc = subprocess.run([os.environ.get('RUSTC', 'rustc'), '--version'], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return {'rustc': rustc, 'libc': ' '.join(platform.libc_ver()), 'arch': platform.machine()}


def counted(summaries):
    """{bench: {id: [instructions of all threads in each run]}}"""
    found = {}
    for file in sorted(Path(summaries).rglob('summary.json')):
        summary = json.loads(file.read_text())
        total = 0
        for profile in summary['profiles']:
            for part in profile['data']['parts']:
                values = part['metrics']['Ir']['values']
                total += values['new']
        found.setdefault(summary['function_name'], {}).setdefault(summary['id'], []).append(total)
    return found


def per_item(counts, of):
    """{bench: instructions for each file or round}: what starting costs is taken off; `of` makes one of several runs."""
    result = {}
    for bench, ids in counts.items():
        many = [i for i in ids if i != 'none']
        if 'none' not in ids or len(many) != 1:
            sys.exit('regress.py: %s has %s, not none and one other' % (bench, ', '.join(ids)))
        result[bench] = (of(ids[many[0]]) - of(ids['none'])) / int(many[0].rsplit('_', 1)[1])
    return result


def verdict(now, before, limit):
    """Lines for people, and whether all is well."""
    lines, well = [], True
    for bench in sorted(now.keys() | before.keys()):
        if bench not in before:
            lines.append('%-12s %10.1f             new: make bench-baseline' % (bench, now[bench]))
            continue
        if bench not in now:
            lines.append('%-12s            was %10.1f: not measured' % (bench, before[bench]))
            well = False
            continue
        change = 100 * (now[bench] / before[bench] - 1)
        bad = change > limit
        well = well and not bad
        lines.append('%-12s %10.1f was %10.1f %+6.2f %%%s' % (bench, now[bench], before[bench], change, '  SLOWER' if bad else ''))
    return lines, well


def main():
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in ('compare', 'write'):
        sys.exit(__doc__)
    what, summaries, baseline = sys.argv[1:4]
    limit = float(sys.argv[4]) if len(sys.argv) > 4 else 3.0
    now = per_item(counted(summaries), min if what == 'compare' else statistics.median)
    if not now:
        sys.exit('regress.py: nothing in %s: cargo bench --bench instructions -- --save-summary=json' % summaries)
    if what == 'write':
        rounded = {bench: round(n, 1) for bench, n in sorted(now.items())}
        Path(baseline).write_text(json.dumps({'of': machine(), 'instructions_per_item': rounded}, indent=1) + '\n')
        print('written: %s' % baseline)
        return
    stored = json.loads(Path(baseline).read_text())
    lines, well = verdict(now, stored['instructions_per_item'], limit)
    print('instructions for each file or round; limit %+g %%' % limit)
    print('\n'.join(lines))
    if stored['of'] != machine():
        print('the baseline is of %s, this is %s: not to be compared; BASE=COMMIT measures both here' % (stored['of'], machine()))
        sys.exit(3)
    sys.exit(0 if well else 1)


if __name__ == '__main__':
    main()
