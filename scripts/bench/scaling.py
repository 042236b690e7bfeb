#!/usr/bin/env python3
"""scaling.py: what scaling.sh runs; its head tells the places and the variables."""
import json
import os
import re
import statistics
import subprocess
import sys
import time

import compare

JOBS = [int(n) for n in os.environ.get('JOBS', '1 2 4 8 16 32').split()]
COUNTS, TIMES = os.environ.get('COUNT', 'yes') == 'yes', os.environ.get('TIME', 'yes') == 'yes'


def words(jobs, dst):
    # --json tells how many threads there were: --jobs is a limit.
    return [compare.MIRRORFS, 'sync', '--fsync', 'never', '--json', '--jobs', str(jobs), '{s}', dst]


def timed(src, jobs, dst):
    """Clock, processor seconds, context switches, and the run's own report."""
    begin = time.monotonic()
    child = subprocess.Popen([w.format(s=src) for w in words(jobs, dst)], stdout=subprocess.PIPE)
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    clock = time.monotonic() - begin
    if status:
        sys.exit('scaling.py: sync failed: %s' % said)
    return {'clock': clock, 'cpu': used.ru_utime + used.ru_stime, 'switches': used.ru_nvcsw + used.ru_nivcsw, **json.loads(said)}


def futexes(src, jobs, dst):
    log = dst + '.futex'
    subprocess.run(['strace', '-f', '-c', '-e', 'trace=futex', '-o', log, *[w.format(s=src) for w in words(jobs, dst)]],
                   check=True, stdout=subprocess.DEVNULL)
    calls = [int(line.split()[3]) for line in open(log) if line.rstrip().endswith('futex')]
    return sum(calls)


def instructions(src, jobs, dst):
    p = subprocess.run(['valgrind', '--tool=callgrind', '--callgrind-out-file=/dev/null', *[w.format(s=src) for w in words(jobs, dst)]],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return int(re.search(r'Collected : (\d+)', p.stderr).group(1))


class Place:
    """A source that answers from memory, or one that takes its time."""

    def __init__(self, kind, fs):
        self.lab = compare.Lab()
        try:
            self.src = self.lab.volume('src', fs) + '/tree'
            self.to = self.lab.volume('dst', fs)
            compare.make(self.src, 'small' if kind == 'memory' else kind)
            self.slow = compare.Slow(self.lab, int(kind[4:]) * 1000) if kind != 'memory' else None
            self.files = sum(len(f) for _, _, f in os.walk(self.src))
            os.sync()
            if self.slow:
                self.count()
        except BaseException:
            self.lab.close()
            raise

    def bound(self, jobs):
        """Seconds that the requests of one copy take, each as long as it must, so many at once; None: from memory."""
        if self.slow is None:
            return None
        return self.requests * self.slow.us / 1e6 / jobs

    def count(self):
        """Requests of one copy, by slowfs itself."""
        self.lab.renew(self.to)
        said = []
        with self.slow.serving(self.src, said) as src:
            timed(src, 32, self.to + '/copy')
        self.requests = sum(int(n) for n in re.findall(r'[a-z]+=(\d+)', ' '.join(said)))

    def run(self, how, jobs):
        self.lab.renew(self.to)
        os.sync()
        if self.slow is None:
            compare.warm(self.src)
            return how(self.src, jobs, self.to + '/copy')
        with self.slow.serving(self.src) as src:
            return how(src, jobs, self.to + '/copy')


def measure(kind, fs):
    place = Place(kind, fs)
    try:
        runs = {jobs: [] for jobs in JOBS}
        for _ in range(compare.ROUNDS if TIMES else 1):
            for jobs in JOBS:
                runs[jobs].append(place.run(timed, jobs))
        print('\n### %s, %s, %d files\n' % (kind, fs, place.files))
        if place.slow:
            print('%d requests, %.2f a file; bound: requests x %g ms / threads\n' % (place.requests, place.requests / place.files, place.slow.us / 1000))
        print('| --jobs | threads | clock s | min-max | clock / bound | processor s | context switches a file | futex calls a file | instructions a file |')
        print('| --- | --- | --- | --- | --- | --- | --- | --- | --- |')
        for jobs in JOBS:
            mid = lambda key: statistics.median(r[key] for r in runs[jobs])
            clocks = [r['clock'] for r in runs[jobs]]
            count = ['%.2f' % (place.run(futexes, jobs) / place.files), '%.0f' % (place.run(instructions, jobs) / place.files)] if COUNTS else ['', '']
            bound = place.bound(jobs)
            times = '%.2f' % (mid('clock') / bound) if bound else ''
            print('| %d | %d | %.2f | %.2f-%.2f | %s | %.2f | %.2f | %s | %s |' % (
                jobs, mid('threads'), mid('clock'), min(clocks), max(clocks), times, mid('cpu'), mid('switches') / place.files, *count), flush=True)
    finally:
        place.lab.close()


def main():
    for kind in sys.argv[1:] or ['memory', 'slow1']:
        measure(kind, os.environ.get('FS', 'ext4'))


if __name__ == '__main__':
    main()
