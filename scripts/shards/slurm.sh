#!/bin/bash
# slurm.sh: `sync --shard auto` under a real Slurm and under Open MPI, a shard killed and restarted.
# A Slurm of its own, four nodes on this machine, in one temporary directory; as root.
# Needs slurmctld, slurmd, munge, openmpi-bin and rsync; prints what rsync says of the result.
set -euo pipefail
bin=$(readlink -f "${MIRRORFS:-target/release/mirrorfs}")
work=$(mktemp -d "${TMPDIR:-/tmp}/mirrorfs-slurm.XXXXXX")
chmod 755 "$work"
pids=()
cleanup() {
    [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
for need in slurmctld slurmd munged sbatch mpirun rsync; do
    command -v $need >/dev/null || { echo "missing: $need"; exit 1; }
done

host=$(hostname -s)
mkdir -p "$work"/{state,spool,munge}
chmod 700 "$work/munge"
head -c 1024 /dev/urandom >"$work/munge/key"
chmod 400 "$work/munge/key"
chmod 711 "$work"
munge=$work/munge
munged --foreground --force --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" \
    --log-file="$munge/log" --seed-file="$munge/seed" >"$work/munged.out" 2>&1 &
pids+=($!)
port=$((20000 + RANDOM % 20000))
cat >"$work/slurm.conf" <<CONF
ClusterName=shards
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$munge/socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmctldPidFile=$work/ctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/ctld.log
SlurmdLogFile=$work/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=2
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=n[1-4] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 4))] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4
CONF
export SLURM_CONF=$work/slurm.conf
slurmctld -D >"$work/ctld.out" 2>&1 &
pids+=($!)
for node in n1 n2 n3 n4; do
    mkdir -p "$work/spool/$node"
    slurmd -D -N $node >"$work/slurmd-$node.out" 2>&1 &
    pids+=($!)
done
for _ in $(seq 60); do
    [ "$(sinfo -h -o %D -t idle 2>/dev/null)" = 4 ] && break
    sleep 1
done
sinfo

# Many directories, hard links across them, small and large files, times of long ago.
python3 - "$work/src" <<'TREE'
import os, sys
top = sys.argv[1]
for d in range(200):
    at = f"{top}/a{d % 7}/b{d}"
    os.makedirs(at)
    for f in range(15):
        with open(f"{at}/f{f}", "wb") as out:
            out.write(os.urandom(200 + 37 * f) if f else os.urandom(1 << 18))
for g in range(150):
    for n in range(1, 6):
        e = (g + 31 * n) % 200
        os.link(f"{top}/a{g % 7}/b{g}/f{n}", f"{top}/a{e % 7}/b{e}/link{g}-{n}")
for d, (path, dirs, files) in enumerate(os.walk(top, topdown=False)):
    for name in files:
        os.utime(f"{path}/{name}", ns=(10**18, 10**18 + d))
    os.utime(path, ns=(10**18, 10**18 + 7 * d))
TREE

check() {
    local out
    out=$(rsync -naHAXc --delete -i "$work/src/" "$work/dst/")
    echo "$1: $(find "$work/src" | wc -l) entries, $(printf %s "$out" | grep -c . || true) differences by rsync -naHAXc --delete -i"
    [ -z "$out" ] || { printf '%s\n' "$out" | head -20; exit 1; }
    rm -rf "$work/dst"
}
done_within() { # SECONDS JOB: waits until the job has left the queue
    for _ in $(seq "$1"); do
        [ -z "$(squeue -h)" ] && return
        sleep 1
    done
    echo "job $2 has not ended"; squeue; exit 1
}
sync="$bin sync --shard auto --delete $work/src $work/dst"

echo "== srun, four tasks on four nodes"
timeout 120 srun -N4 -n4 $sync 2>&1 | sort
check "srun"

echo "== an array of four; task 2 is killed on its node, and requeued"
cat >"$work/array.sh" <<JOB
#!/bin/bash
# The first time task 2 is so slow that it is killed at work.
limit=
[ "\$SLURM_ARRAY_TASK_ID" = 2 ] && [ "\${SLURM_RESTART_COUNT:-0}" = 0 ] && limit="--bwlimit 20"
exec $sync \$limit
JOB
job=$(sbatch --parsable --requeue --array=1-4 -o "$work/array-%a.out" --open-mode=append "$work/array.sh")
for _ in $(seq 60); do
    [ -e "$work/dst/.mirrorfs/shards/4/2.sync" ] && break
    sleep 0.2
done
victim=$(pgrep -f "^$sync --bwlimit" || true)
[ -n "$victim" ] || { echo "task 2 is not at work"; exit 1; }
kill -9 $victim
echo "killed: $victim, shard 2/4, in the middle; requeued"
sleep 1
# A task that failed is requeued by hand, or by an epilog; Slurm would have it wait for two minutes.
scontrol requeue "${job}_2"
scontrol update JobId="${job}_2" StartTime=now
done_within 120 "$job"
sort "$work"/array-*.out | uniq -c
check "array"

echo "== Open MPI, four ranks; one is killed, mpirun ends all, and is started again"
mpi="timeout 120 mpirun --allow-run-as-root --oversubscribe -np 4"
$mpi bash -c "[ \$OMPI_COMM_WORLD_RANK = 1 ] && limit='--bwlimit 20'; exec $sync \$limit" >"$work/mpi.out" 2>&1 &
mpirun=$!
for _ in $(seq 100); do
    [ -e "$work/dst/.mirrorfs/shards/4/2.sync" ] && break
    sleep 0.1
done
victim=$(pgrep -f "^$sync --bwlimit" || true)
[ -n "$victim" ] && kill -9 $victim
wait $mpirun && { echo "mpirun did not notice"; exit 1; }
[ -d "$work/dst/.mirrorfs" ] || { echo "nothing was left to do"; exit 1; }
$mpi $sync 2>&1 | sort
check "mpirun"
