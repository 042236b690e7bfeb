//! `sync --shard`: several processes copy one tree into one DST, without a message between them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::compare;
use crate::crash::FAULT_EXIT;
use crate::fixture::{
    CONTROL, LIMIT, LoopFs, Output, Scratch, bytes, can_mount_on, find_program, mirrorfs, need,
    run, wait_until,
};
use crate::nasty;
use crate::raw;

/// A src whose hard links go across directories, and a dst.
struct Trees {
    src: PathBuf,
    dst: PathBuf,
    _scratch: Option<Scratch>,
    _fs: Option<LoopFs>,
}

/// Directories of the tree that the tests make.
const DIRS: usize = 24;
/// Inodes with several names.
const GROUPS: usize = 40;

impl Trees {
    fn new() -> Trees {
        let scratch = Scratch::new();
        let trees = Trees {
            src: scratch.dir("src"),
            dst: scratch.dir("dst"),
            _scratch: Some(scratch),
            _fs: None,
        };
        fill(&trees.src);
        trees
    }

    /// On a file system of their own, with every awkward thing.
    fn nasty(kind: &str) -> Trees {
        let fs = LoopFs::new(kind);
        let (src, dst) = (fs.dir("src"), fs.dir("dst"));
        nasty::fill(&src);
        fill(&src.join("filled"));
        Trees {
            src,
            dst,
            _scratch: None,
            _fs: Some(fs),
        }
    }

    fn shard(&self, shard: &str) -> Command {
        let mut command = mirrorfs();
        command.args(["sync", "--shard", shard, "--delete"]);
        command.arg(&self.src).arg(&self.dst);
        command
    }

    /// All shards at once; each must exit with 0.
    #[track_caller]
    fn all_at_once(&self, count: usize) {
        for (number, child) in start(self, 1..=count, count, &[]) {
            wait(child, &format!("{number}/{count}")).expect_code(0);
        }
    }

    #[track_caller]
    fn expect_copy(&self) {
        assert!(
            !self.control().exists(),
            "not ended: {:?}",
            walk(&self.control())
        );
        compare::expect_equal(&compare::manifest(&self.src), &compare::manifest(&self.dst));
        expect_rsync_finds_nothing(self);
    }

    fn control(&self) -> PathBuf {
        self.dst.join(CONTROL)
    }

    fn round(&self) -> PathBuf {
        self.control().join("shards")
    }
}

fn fill(src: &Path) {
    for d in 0..DIRS {
        let dir = src.join(format!("d{}/e{d}", d % 5));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("own"), bytes(d as u64, 100 + d)).unwrap();
        std::os::unix::fs::symlink("own", dir.join("link")).unwrap();
    }
    let dir = |d: usize| src.join(format!("d{}/e{}", d % DIRS % 5, d % DIRS));
    for g in 0..GROUPS {
        let first = dir(g).join(format!("g{g}"));
        // Small, large enough to be copied in parts, and empty.
        let size = [300, 1 << 20, 0][g % 3];
        fs::write(&first, bytes(1000 + g as u64, size)).unwrap();
        for n in 1..7 {
            fs::hard_link(&first, dir(g + n * 5).join(format!("g{g}-{n}"))).unwrap();
        }
        let link = dir(g).join(format!("l{g}"));
        std::os::unix::fs::symlink(format!("g{g}"), &link).unwrap();
        fs::hard_link(&link, dir(g + 1).join(format!("l{g}-1"))).unwrap();
    }
    // Times that nobody sets by accident.
    for (n, entry) in walk(src).iter().rev().enumerate() {
        let time =
            std::time::UNIX_EPOCH + std::time::Duration::from_nanos(1_000_000_007 * n as u64);
        if !entry.is_symlink() {
            fs::File::open(entry).unwrap().set_modified(time).unwrap();
        }
    }
}

/// A directory and all below it, each after its parent.
fn walk(top: &Path) -> Vec<PathBuf> {
    let mut all = vec![top.to_owned()];
    let mut next = 0;
    while next < all.len() {
        if all[next].is_dir() && !all[next].is_symlink() {
            let names = fs::read_dir(&all[next]).unwrap();
            all.extend(names.map(|e| e.unwrap().path()));
        }
        next += 1;
    }
    all
}

fn start(
    trees: &Trees,
    numbers: impl IntoIterator<Item = usize>,
    count: usize,
    env: &[(&str, &str)],
) -> Vec<(usize, Child)> {
    let start = |number| {
        let mut command = trees.shard(&format!("{number}/{count}"));
        command.envs(env.iter().copied());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        (number, raw::die_with_parent(&mut command).spawn().unwrap())
    };
    numbers.into_iter().map(start).collect()
}

#[track_caller]
fn wait(mut child: Child, what: &str) -> Output {
    wait_until(what, LIMIT, || child.try_wait().unwrap().is_some());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Output {
        status: output.status,
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

#[track_caller]
fn expect_rsync_finds_nothing(trees: &Trees) {
    if !need(find_program("rsync").is_some(), "rsync") {
        return;
    }
    let mut command = Command::new("rsync");
    // What rsync itself cannot look at: paths beyond PATH_MAX; and a hole is read byte by byte.
    command.args([
        "-naHAXc",
        "--delete",
        "-i",
        "--exclude=/holes/huge",
        "--exclude=/deep*",
    ]);
    let slash = |path: &Path| format!("{}/", path.display());
    let said = run(command.arg(slash(&trees.src)).arg(slash(&trees.dst)));
    assert_eq!(said.out, "", "rsync: {}", said.err);
}

#[test]
fn shards_at_once_make_one_tree_and_the_last_takes_all_traces_away() {
    let t = Trees::new();
    fs::remove_dir(&t.dst).unwrap(); // Whoever comes first makes it.
    t.all_at_once(5);
    t.expect_copy();
    // A second round finds nothing to do, and ends as well.
    for (number, child) in start(&t, 1..=3, 3, &[]) {
        wait(child, &number.to_string()).expect_code(0);
    }
    t.expect_copy();
}

#[test]
fn awkward_trees_are_copied_by_shards_as_by_one() {
    for kind in ["ext4", "xfs", "btrfs"] {
        if need(can_mount_on(kind), &format!("root and mkfs.{kind}")) {
            let t = Trees::nasty(kind);
            t.all_at_once(3);
            t.expect_copy();
        }
    }
}

#[test]
fn a_shard_that_was_killed_and_started_again_leaves_no_difference() {
    let t = Trees::new();
    let (count, victim) = (4, 2);
    let others = (1..=count).filter(|n| *n != victim);
    let mut slow = t.shard(&format!("{victim}/{count}"));
    // So slow that it cannot have ended.
    let slow = slow.args(["--bwlimit", "1"]);
    let mut slow = raw::die_with_parent(slow).spawn().unwrap();
    let record = t.round().join(format!("{count}/{victim}.sync"));
    wait_until("the first file of the victim", LIMIT, || record.exists());
    let others = start(&t, others, count, &[]);
    slow.kill().unwrap();
    slow.wait().unwrap();
    for (number, child) in others {
        wait(child, &number.to_string()).expect_code(0);
    }
    assert!(
        t.round().exists(),
        "a round without one of its shards has ended"
    );
    let said = run(t.shard(&format!("{victim}/{count}")).arg("--stats")).expect_code(0);
    assert!(said.out.contains("shard        2/4\n"), "{}", said.out);
    t.expect_copy();
}

#[test]
fn a_shard_that_ends_at_each_point_of_a_hard_link_is_made_good_by_the_next() {
    for (point, nth) in [
        ("shard-made", 1),
        ("shard-made", 7),
        ("shard-shared", 1),
        ("shard-shared", 9),
        ("shard-ended", 1),
        ("shard-moved", 1),
    ] {
        let t = Trees::new();
        let fault = format!("{point}:{nth}");
        let others = || {
            for (_, child) in start(&t, [2, 3], 3, &[]) {
                wait(child, &fault).expect_code(0);
            }
        };
        // Only the last shard of a round takes it away; else the others come while the first is dead.
        let last = point == "shard-moved";
        if last {
            others();
        }
        for (_, child) in start(&t, [1], 3, &[("MIRRORFS_FAULT", &fault)]) {
            wait(child, &fault).expect_code(FAULT_EXIT);
        }
        if !last {
            others();
        }
        if t.round().exists() {
            run(&mut t.shard("1/3")).expect_code(0);
        }
        if t.control().exists() {
            // Half taken away: that goes with the next round.
            assert_eq!(point, "shard-moved");
            t.all_at_once(2);
        }
        eprintln!("{fault}");
        t.expect_copy();
    }
}

#[test]
fn a_round_that_was_given_up_is_ended_by_another_number_of_shards_or_by_none() {
    let t = Trees::new();
    run(&mut t.shard("1/7")).expect_code(0);
    run(&mut t.shard("4/7")).expect_code(0);
    assert!(t.round().join("7/4.done").exists());
    t.all_at_once(2);
    t.expect_copy();

    run(&mut t.shard("1/7")).expect_code(0);
    let run_dir = Scratch::new();
    let refused = run(mirrorfs()
        .env("MIRRORFS_RUN_DIR", run_dir.path())
        .args(["mount", "--adopt"])
        .arg(&t.src)
        .arg(&t.dst));
    assert!(
        refused.err.contains("(.mirrorfs/shards)"),
        "{}",
        refused.err
    );
    assert!(
        refused.err.contains("run mirrorfs sync once more"),
        "{}",
        refused.err
    );
    refused.expect_code(3);
    run(mirrorfs().arg("sync").arg(&t.src).arg(&t.dst)).expect_code(0);
    t.expect_copy();
}

#[test]
fn what_shards_meet_in_dst_becomes_what_src_has() {
    let t = Trees::new();
    t.all_at_once(2);
    let at = |root: &Path, d: usize| root.join(format!("d{}/e{d}", d % 5));
    // Files where src has directories, and the reverse; names that src lost; links that it never had.
    fs::remove_dir_all(t.dst.join("d1")).unwrap();
    fs::write(t.dst.join("d1"), b"a file").unwrap();
    fs::remove_file(at(&t.dst, 2).join("own")).unwrap();
    fs::create_dir_all(at(&t.dst, 2).join("own/deep/er")).unwrap();
    fs::create_dir_all(at(&t.dst, 3).join("gone/deep")).unwrap();
    fs::write(at(&t.src, 4).join("twin"), b"twin").unwrap();
    fs::write(at(&t.src, 15).join("twin"), b"twin").unwrap();
    let time = std::time::UNIX_EPOCH;
    for root in [&t.src, &t.dst] {
        fs::write(at(root, 4).join("twin"), b"twin").unwrap();
        let file = fs::File::open(at(root, 4).join("twin")).unwrap();
        file.set_modified(time).unwrap();
    }
    let file = fs::File::open(at(&t.src, 15).join("twin")).unwrap();
    file.set_modified(time).unwrap();
    fs::hard_link(at(&t.dst, 4).join("twin"), at(&t.dst, 15).join("twin")).unwrap();
    t.all_at_once(4);
    t.expect_copy();
}

#[test]
fn groups_that_were_one_inode_in_dst_become_as_many_as_in_src() {
    let t = Trees::new();
    // Two groups of two in src, equal in all but the inode; one group of four in dst.
    let names: Vec<_> = (0..4).map(|n| format!("d{n}/same{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        match n % 2 {
            0 => fs::write(t.src.join(name), b"same").unwrap(),
            _ => fs::hard_link(t.src.join(&names[n - 1]), t.src.join(name)).unwrap(),
        }
    }
    fs::create_dir_all(t.dst.join("d0")).unwrap();
    fs::write(t.dst.join(&names[0]), b"same").unwrap();
    for name in &names {
        fs::create_dir_all(t.dst.join(name).parent().unwrap()).unwrap();
        if *name != names[0] {
            fs::hard_link(t.dst.join(&names[0]), t.dst.join(name)).unwrap();
        }
    }
    for name in [&names[0], &names[2]] {
        for root in [&t.src, &t.dst] {
            let file = fs::File::open(root.join(name)).unwrap();
            file.set_modified(std::time::UNIX_EPOCH).unwrap();
        }
    }
    t.all_at_once(4);
    t.expect_copy();
    let ino = |name: &str| fs::metadata(t.dst.join(name)).unwrap().ino();
    assert_eq!(ino(&names[0]), ino(&names[1]));
    assert_ne!(ino(&names[0]), ino(&names[2]));
}

#[test]
fn an_inode_with_more_names_than_dst_can_give_it_gets_a_successor() {
    if !can_mount_on("ext4") || !can_mount_on("xfs") {
        return;
    }
    // ext4 gives 65,000 to one inode, xfs more than anybody makes.
    let (src_fs, fs) = (LoopFs::new("xfs"), LoopFs::new("ext4"));
    let t = Trees {
        src: src_fs.dir("src"),
        dst: fs.dir("dst"),
        _scratch: None,
        _fs: Some(fs),
    };
    let first = t.src.join("first");
    fs::write(&first, b"many").unwrap();
    for n in 0..65_100 {
        let dir = t.src.join(format!("d{}", n % 4));
        if n < 4 {
            fs::create_dir(&dir).unwrap();
        }
        fs::hard_link(&first, dir.join(n.to_string())).unwrap();
    }
    t.all_at_once(2);
    let mut inodes: Vec<u64> = walk(&t.dst)
        .iter()
        .map(|p| fs::metadata(p).unwrap())
        .filter(fs::Metadata::is_file)
        .map(|m| m.ino())
        .collect();
    assert_eq!(inodes.len(), 65_101);
    inodes.sort_unstable();
    inodes.dedup();
    assert_eq!(inodes.len(), 2);
    assert!(!t.control().exists());
}

#[test]
pub(crate) fn auto_reads_what_the_starter_says_and_says_what_it_went_by() {
    let t = Trees::new();
    let auto = |args: &[&str], env: &[(&str, &str)]| {
        let mut command = mirrorfs();
        command.args(["sync", "--shard", "auto"]).args(args);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("SLURM_") {
                command.env_remove(name);
            }
        }
        run(command.envs(env.iter().copied()).arg(&t.src).arg(&t.dst))
    };
    for index in ["0", "1"] {
        let env = [("JOB_COMPLETION_INDEX", index)];
        let said = auto(&["--shards", "2"], &env).expect_code(0);
        let number = index.parse::<u32>().unwrap() + 1;
        let line = format!("mirrorfs: shard {number}/2, by JOB_COMPLETION_INDEX\n");
        assert_eq!(said.err, line);
    }
    t.expect_copy();
    for (args, env, line) in [
        (&[][..], &[][..], "--shard auto: no SLURM_ARRAY_TASK_ID"),
        (&[], &[("JOB_COMPLETION_INDEX", "0")], "give --shards N"),
        (
            &[],
            &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")],
            "start it by srun",
        ),
        (
            &[],
            &[
                ("SLURM_ARRAY_TASK_ID", "5"),
                ("SLURM_ARRAY_TASK_MIN", "1"),
                ("SLURM_ARRAY_TASK_MAX", "9"),
                ("SLURM_ARRAY_TASK_COUNT", "3"),
            ],
            "has gaps",
        ),
        (
            &[],
            &[
                ("SLURM_ARRAY_TASK_ID", "1"),
                ("SLURM_ARRAY_TASK_MIN", "1"),
                ("SLURM_ARRAY_TASK_MAX", "2"),
                ("SLURM_PROCID", "1"),
                ("SLURM_STEP_NUM_TASKS", "2"),
            ],
            "ambiguous",
        ),
        (
            &["--verify"],
            &[("PMI_RANK", "0"), ("PMI_SIZE", "1")],
            "--verify with --shard",
        ),
    ] {
        let said = auto(args, env).expect_code(2);
        assert!(said.err.contains(line), "{}", said.err);
    }
    let said = run(&mut t.shard("3/2")).expect_code(2);
    assert!(
        said.err.contains("not K/N with K from 1 to N"),
        "{}",
        said.err
    );
}

#[test]
fn a_dry_run_of_a_shard_changes_nothing_and_leaves_no_trace() {
    let t = Trees::new();
    let before = compare::manifest(&t.dst);
    let said = run(t.shard("1/2").args(["-n", "-i"])).expect_code(0);
    assert!(said.out.contains("+++++++++"), "{}", said.out);
    compare::expect_equal(&before, &compare::manifest(&t.dst));
}

#[test]
fn shards_that_end_at_the_same_moment_all_succeed_and_leave_nothing() {
    let t = Trees::new();
    t.all_at_once(4);
    // Nothing is left to do: they end together.
    for _ in 0..8 {
        t.all_at_once(4);
        assert!(!t.control().exists());
    }
    t.expect_copy();
}

#[test]
fn what_others_have_left_goes_with_the_round() {
    let t = Trees::new();
    // A killed run of another boot without shards, and a round that was half taken away.
    let left = |t: &Trees| {
        fs::create_dir_all(t.control().join("shards-7/links")).unwrap();
        fs::write(t.control().join("shards-7/links/anchor"), "x").unwrap();
    };
    left(&t);
    fs::write(t.control().join("sync"), "another boot\n").unwrap();
    t.all_at_once(2);
    t.expect_copy();
    left(&t);
    run(mirrorfs().arg("sync").arg(&t.src).arg(&t.dst)).expect_code(0);
    t.expect_copy();
    // One shard once more: the root stays as its owner has left it.
    for shard in ["1/2", "2/2"] {
        run(&mut t.shard(shard)).expect_code(0);
        let mtime = |root: &Path| fs::metadata(root).unwrap().modified().unwrap();
        assert_eq!(mtime(&t.src), mtime(&t.dst), "{shard}");
    }
    t.expect_copy();
}

#[test]
fn hard_links_that_nobody_may_change_and_symlinks_in_the_way_are_no_failures() {
    if !can_mount_on("ext4") {
        return;
    }
    let fs = LoopFs::new("ext4");
    let t = Trees {
        src: fs.dir("src"),
        dst: fs.dir("dst"),
        _scratch: None,
        _fs: Some(fs),
    };
    fill(&t.src);
    let flag = |flag: &str, root: &Path| {
        for g in ["d0/e0/g0", "d1/e1/g1"] {
            run(Command::new("chattr").arg(flag).arg(root.join(g))).expect_code(0);
        }
    };
    flag("+i", &t.src);
    t.all_at_once(2);
    t.all_at_once(3);
    t.expect_copy();
    for root in [&t.src, &t.dst] {
        flag("-i", root);
    }
    // One after the other: whose parent is another's meets the symlink first.
    let outside = t.src.with_file_name("outside");
    fs::create_dir(&outside).unwrap();
    for dir in ["d2", "d3", "d4"] {
        fs::remove_dir_all(t.dst.join(dir)).unwrap();
        std::os::unix::fs::symlink(&outside, t.dst.join(dir)).unwrap();
    }
    for shard in ["1/3", "2/3", "3/3"] {
        run(&mut t.shard(shard)).expect_code(0);
    }
    t.expect_copy();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn a_shard_that_is_started_twice_goes_on_and_the_second_one_ends_with_one_line() {
    let trees = Trees::new();
    for n in 0..8 {
        let dir = trees.src.join(format!("bulk{n}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), bytes(n, 100_000)).unwrap();
    }
    let mut slow = trees.shard("1/2");
    slow.args(["--bwlimit=100", "-j1"]);
    slow.stdout(Stdio::piped()).stderr(Stdio::piped());
    let first = raw::die_with_parent(&mut slow).spawn().unwrap();
    wait_until("the shard is at work", LIMIT, || {
        trees.round().join("2/1.run").exists()
    });
    // Time for its lock.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let second = run(&mut trees.shard("1/2")).expect_code(3);
    assert_eq!(second.err.lines().count(), 1, "{}", second.err);
    let line = "shard 1/2 is at work already";
    assert!(second.err.contains(line), "{}", second.err);
    // Another one is not in its way.
    run(&mut trees.shard("2/2")).expect_code(0);
    wait(first, "the first one").expect_code(0);
    trees.expect_copy();
}

/// Whoever begins a shard at the moment at which another process ends it: whoever is last ends the round.
#[test]
fn a_shard_that_begins_as_the_same_one_ends_leaves_no_difference_and_no_traces() {
    let trees = Trees::new();
    for _ in 0..10 {
        let running: Vec<_> = (0..4)
            .map(|n| {
                let mut command = trees.shard(["1/2", "2/2"][n % 2]);
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
                raw::die_with_parent(&mut command).spawn().unwrap()
            })
            .collect();
        for child in running {
            let said = wait(child, "a shard");
            assert!([0, 3].contains(&said.code()), "{}{}", said.out, said.err);
        }
        // One of them may have ended a round that the other had begun anew: the next shard ends that.
        for shard in ["1/2", "2/2", "1/2"] {
            run(&mut trees.shard(shard)).expect_code(0);
            if !trees.dst.join(".mirrorfs").exists() {
                break;
            }
        }
        trees.expect_copy();
    }
}
