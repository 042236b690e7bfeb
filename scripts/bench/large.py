#!/usr/bin/env python3
"""large.py: what large.sh runs; its head tells the variables."""
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import compare

DISK = os.environ.get('DISK') == 'yes'
PEERS = ['mirrorfs sync', 'cp -a', 'rsync -aHAX', 'xcp', 'fcp']
FILES = 3                                   # of compare.make


def fio(rw, where, size, flush):
    """Seconds for as many files as the tree has, each by a process of its own."""
    words = ['fio', '--name=bound', '--directory=' + where, '--rw=' + rw, '--bs=1M', '--size=%d' % size, '--numjobs=%d' % FILES,
             '--ioengine=psync', '--fallocate=none', '--invalidate=0', '--output-format=json'] + (['--end_fsync=1'] if flush else [])
    said = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return max(job['job_runtime'] for job in said['jobs']) / 1000


def synced(at):
    begin = time.monotonic()
    subprocess.run(['sync', '-f', at], check=True)
    return time.monotonic() - begin


class Place:
    def __init__(self, fs, same):
        self.lab, self.same = compare.Lab(), same
        try:
            self.at = self.lab.volume('src', fs, on_disk=DISK)
            self.to = self.at if same else self.lab.volume('dst', fs, on_disk=DISK)
            compare.make(self.at + '/tree', 'large')
        except BaseException:
            self.lab.close()
            raise

    def fresh(self):
        """The same state before each run: nothing in dst, all or nothing of src cached."""
        for name in ('copy', 'fio'):
            shutil.rmtree('%s/%s' % (self.to, name), ignore_errors=True)
        os.sync()
        (compare.cold if DISK else compare.warm)(self.at + '/tree')

    def round(self, tools, size, results):
        self.fresh()
        os.mkdir(self.to + '/fio')
        for key, rw, flush in (('write', 'write', False), ('flush', 'write', True), ('read', 'read', False)):
            if flush:
                self.fresh()
                os.mkdir(self.to + '/fio')
            if rw == 'read' and DISK:
                compare.cold(self.to + '/fio')
            results['fio ' + key].append((fio(rw, self.to + '/fio', size, flush), 0.0))
        for tool in tools:
            self.fresh()
            clock, _, _, status = compare.run(compare.TOOLS[tool][1], self.at + '/tree', self.to + '/copy')
            if status:
                sys.exit('large.py: %s failed: exit %d' % (tool, status))
            results[tool].append((clock, clock + synced(self.to)))


def measure(fs, same, tools):
    place = Place(fs, same)
    try:
        size = os.path.getsize(place.at + '/tree/big0')
        results = {key: [] for key in ('fio read', 'fio write', 'fio flush', *tools)}
        for _ in range(compare.ROUNDS):
            place.round(tools, size, results)
    finally:
        place.lab.close()
    mid = lambda key, i=0: statistics.median(r[i] for r in results[key])
    mib = FILES * size / compare.MIB
    bound, flushed = max(mid('fio read'), mid('fio write')), max(mid('fio read'), mid('fio flush'))
    print('\n### large files, %s, %s, %s\n' % (fs, 'one file system' if same else 'to another', 'disk, not cached' if DISK else 'memory, cached'))
    print('fio: read %.0f, write %.0f, write and fsync %.0f MiB/s\n' % tuple(mib / mid(k) for k in ('fio read', 'fio write', 'fio flush')))
    print('| tool | MiB/s | of the bound | min-max s | until on the device MiB/s | of the bound |\n| --- | --- | --- | --- | --- | --- |')
    for tool in tools:
        clocks = [r[0] for r in results[tool]]
        print('| %s | %.0f | %.0f %% | %.2f-%.2f | %.0f | %.0f %% |' % (
            tool, mib / mid(tool), 100 * bound / mid(tool), min(clocks), max(clocks), mib / mid(tool, 1), 100 * flushed / mid(tool, 1)), flush=True)
    return {'fs': fs, 'same': same, 'disk': DISK, 'mib': mib, 'seconds': results}


def main():
    wanted = os.environ.get('TOOLS', '').split()
    tools = [t for t in PEERS if shutil.which(compare.TOOLS[t][0]) and (not wanted or t.split()[0] in wanted)]
    rows = [measure(fs, same, tools) for fs in os.environ.get('FS', 'ext4').split() for same in (True, False)]
    if os.environ.get('OUT'):
        with open(os.environ['OUT'], 'w') as f:
            json.dump(rows, f, indent=1)


if __name__ == '__main__':
    main()
