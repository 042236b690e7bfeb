#!/usr/bin/env python3
"""cut.py: the kit's powercut.py, with two more ways for a disk to lose what was not flushed (powercut.sh starts it).

A random half of many unflushed writes nearly never holds a whole transaction. What finds a write that somebody should have
waited for is a disk that has kept nearly everything, or nearly nothing: `but-one` all unflushed writes save a random one
(or a random run of them, as an elevator leaves it), `one` nothing but a random one.
"""
import os
import sys

sys.dont_write_bytecode = True
here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.environ.get('MIRRORFS_KIT', os.path.join(here, '../../../shared/kit')))
import powercut
import wlog


class Builder(wlog.Builder):
    def state(self, cut, policy, out, clone):
        if policy not in ('but-one', 'one'):
            return super().state(cut, policy, out, clone)
        super().state(cut, 'none', out, clone)
        tail = [r for r in self.recs[self.at:cut + 1] if r[3] == wlog.WRITE]
        first = self.rng.randrange(len(tail)) if tail else 0
        run = self.rng.choice([1, 1, 1, 2, 8]) if policy == 'but-one' else 1
        some = range(first, first + run)
        kept = [r for i, r in enumerate(tail) if (i in some) == (policy == 'one')]
        fd = os.open(out, os.O_RDWR)
        for r in kept:
            self.put(fd, r)
        os.close(fd)
        return len(tail), len(kept)


wlog.Builder = Builder
powercut.main()
