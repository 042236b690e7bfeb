//! Shard: which part of a tree is one process's, when several copy it together.
//!
//! A directory belongs to the shard that the hash of its path says: the same on every machine, so
//! nobody has to ask anybody. `auto` reads the number from who has started the process.

use std::fmt;
use std::str::FromStr;

/// One of `count` parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which part, from 0.
    index: u32,
    /// How many there are, 1 at least.
    count: u32,
    /// The variable that said so; `None`: it was written down.
    by: Option<&'static str>,
}

impl Shard {
    /// Part `number` (from 1) of `count`; `None`: there is no such part.
    pub fn new(number: u32, count: u32) -> Option<Shard> {
        let index = number.checked_sub(1)?;
        (index < count).then_some(Shard {
            index,
            count,
            by: None,
        })
    }

    /// Which part, from 1.
    pub fn number(&self) -> u32 {
        self.index + 1
    }

    /// How many parts there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The variable that `auto` went by.
    pub fn by(&self) -> Option<&'static str> {
        self.by
    }

    /// True for the paths of this part: each path, below the root, is in exactly one.
    pub fn owns(&self, path: &[u8]) -> bool {
        self.count == 1
            || xxhash_rust::xxh3::xxh3_64(path) % u64::from(self.count) == u64::from(self.index)
    }

    /// What the environment says, by whoever has started this process: Slurm, Open MPI, another
    /// PMI, Kubernetes. `count` is needed where it tells a number alone. `Err`: one line.
    pub fn auto(
        variable: impl Fn(&str) -> Option<String>,
        count: Option<u32>,
    ) -> Result<Shard, String> {
        let env = Env(variable);
        let array = env.slurm_array()?;
        // The innermost starter counts: mpirun in a Slurm job leaves SLURM_PROCID as it was.
        let rank = match env.rank("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")? {
            None => match env.rank("PMI_RANK", "PMI_SIZE")? {
                None => env.slurm_task()?,
                rank => rank,
            },
            rank => rank,
        };
        let found = match (array, rank) {
            (Some(array), Some(rank)) if array.count > 1 && rank.count > 1 => {
                return Err(format!(
                    "--shard auto: ambiguous: {} says {array} and {} says {rank}; give K/N",
                    array.origin(),
                    rank.origin()
                ));
            }
            // Every batch script also is task 0 of 1.
            (Some(array), _) => Some(array),
            (None, Some(rank)) => Some(rank),
            (None, None) => env.completion(count)?,
        };
        match (found, count) {
            (Some(shard), Some(count)) if shard.count != count => Err(format!(
                "--shard auto: {} says {shard}, --shards says {count}",
                shard.origin()
            )),
            (Some(shard), _) => Ok(shard),
            (None, _) => Err(
                "--shard auto: no SLURM_ARRAY_TASK_ID, SLURM_PROCID, OMPI_COMM_WORLD_RANK, PMI_RANK or \
                 JOB_COMPLETION_INDEX is set; give K/N"
                    .to_owned(),
            ),
        }
    }

    fn origin(&self) -> &'static str {
        self.by.unwrap_or("--shard")
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number(), self.count)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Shard, String> {
        let parts = text.split_once('/');
        let numbers = parts.and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)));
        let shard = numbers.and_then(|(k, n)| Shard::new(k, n));
        shard.ok_or_else(|| format!("{text}: not K/N with K from 1 to N"))
    }
}

/// The variables of one process.
struct Env<F>(F);

impl<F: Fn(&str) -> Option<String>> Env<F> {
    fn number(&self, name: &str) -> Result<Option<u32>, String> {
        let Some(text) = (self.0)(name).filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let number = text.parse();
        let number = number.map_err(|_| format!("--shard auto: {name}={text} is not a number"))?;
        Ok(Some(number))
    }

    fn needed(&self, name: &str, with: &str) -> Result<u32, String> {
        let number = self.number(name)?;
        number.ok_or_else(|| format!("--shard auto: {with} is set, {name} is not; give K/N"))
    }

    fn at(&self, by: &'static str, index: u32, count: u32) -> Result<Option<Shard>, String> {
        match index < count {
            true => Ok(Some(Shard {
                index,
                count,
                by: Some(by),
            })),
            false => Err(format!(
                "--shard auto: {by} says {index} of {count} (from 0)"
            )),
        }
    }

    /// A rank, from 0, and how many there are.
    fn rank(&self, rank: &'static str, size: &str) -> Result<Option<Shard>, String> {
        match self.number(rank)? {
            None => Ok(None),
            Some(index) => self.at(rank, index, self.needed(size, rank)?),
        }
    }

    fn slurm_array(&self) -> Result<Option<Shard>, String> {
        const ID: &str = "SLURM_ARRAY_TASK_ID";
        let Some(id) = self.number(ID)? else {
            return Ok(None);
        };
        let first = self.needed("SLURM_ARRAY_TASK_MIN", ID)?;
        let last = self.needed("SLURM_ARRAY_TASK_MAX", ID)?;
        let step = self.number("SLURM_ARRAY_TASK_STEP")?.unwrap_or(1).max(1);
        let count = last.saturating_sub(first) / step + 1;
        let told = self.number("SLURM_ARRAY_TASK_COUNT")?.unwrap_or(count);
        if told != count || id < first || (id - first) % step != 0 {
            return Err(format!(
                "--shard auto: the array {first}-{last}:{step} with {told} tasks has gaps; give K/N"
            ));
        }
        self.at(ID, (id - first) / step, count)
    }

    /// A task of srun. A batch script is no such task, although it has SLURM_PROCID=0: what it starts
    /// itself is alone.
    fn slurm_task(&self) -> Result<Option<Shard>, String> {
        const ID: &str = "SLURM_PROCID";
        let Some(index) = self.number(ID)? else {
            return Ok(None);
        };
        let tasks = self.number("SLURM_NTASKS")?.unwrap_or(1);
        match self.number("SLURM_STEP_NUM_TASKS")? {
            Some(count) => self.at(ID, index, count),
            None if tasks == 1 => self.at(ID, index, 1),
            None => Err(format!(
                "--shard auto: this job has {tasks} tasks, and this process is none of them; start it \
                 by srun"
            )),
        }
    }

    fn completion(&self, count: Option<u32>) -> Result<Option<Shard>, String> {
        const ID: &str = "JOB_COMPLETION_INDEX";
        let Some(index) = self.number(ID)? else {
            return Ok(None);
        };
        let count = count.ok_or_else(|| {
            format!("--shard auto: {ID} does not tell how many there are; give --shards N")
        })?;
        self.at(ID, index, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto(env: &str, count: Option<u32>) -> Result<(String, &'static str), String> {
        let find = |name: &str| {
            let pairs = env.split(' ').filter_map(|pair| pair.split_once('='));
            let mut found = pairs.filter(|(k, _)| *k == name).map(|(_, v)| v.to_owned());
            found.next()
        };
        Shard::auto(find, count).map(|s| (s.to_string(), s.origin()))
    }

    #[test]
    fn each_path_is_in_exactly_one_shard() {
        for count in 1..9 {
            for path in ["", "a", "a/b", "a/b/c", "\u{e4}"] {
                let owners = (1..=count).filter(|k| {
                    let shard = Shard::new(*k, count).expect("a shard");
                    shard.owns(path.as_bytes())
                });
                assert_eq!(owners.count(), 1, "{path} of {count}");
            }
        }
        // Stable for ever: another version takes over what this one has begun.
        assert!(Shard::new(1, 4).expect("a shard").owns(b"a/b"));
    }

    #[test]
    fn what_is_no_shard_is_refused() {
        assert_eq!(
            "2/4".parse::<Shard>().map(|s| s.to_string()),
            Ok("2/4".into())
        );
        for text in ["0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2", ""] {
            assert!(text.parse::<Shard>().is_err(), "{text}");
        }
    }

    #[test]
    fn auto_goes_by_who_has_started_it() {
        let ok = |env, count, want: &str, by| {
            assert_eq!(auto(env, count), Ok((want.to_owned(), by)), "{env}");
        };
        let array = "SLURM_ARRAY_TASK_ID=7 SLURM_ARRAY_TASK_MIN=1 SLURM_ARRAY_TASK_MAX=10 \
                     SLURM_ARRAY_TASK_STEP=3 SLURM_ARRAY_TASK_COUNT=4 SLURM_PROCID=0 SLURM_NTASKS=1";
        ok(array, None, "3/4", "SLURM_ARRAY_TASK_ID");
        ok(array, Some(4), "3/4", "SLURM_ARRAY_TASK_ID");
        let task = "SLURM_PROCID=2 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=4";
        ok(task, None, "3/4", "SLURM_PROCID");
        let mpi = "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 SLURM_PROCID=1 SLURM_NTASKS=2";
        ok(mpi, None, "6/8", "OMPI_COMM_WORLD_RANK");
        ok("PMI_RANK=0 PMI_SIZE=2", None, "1/2", "PMI_RANK");
        ok(
            "JOB_COMPLETION_INDEX=3",
            Some(4),
            "4/4",
            "JOB_COMPLETION_INDEX",
        );
    }

    #[test]
    fn auto_never_guesses() {
        for (env, count, why) in [
            ("", None, "no SLURM_ARRAY_TASK_ID"),
            ("JOB_COMPLETION_INDEX=3", None, "give --shards N"),
            ("JOB_COMPLETION_INDEX=4", Some(4), "4 of 4"),
            (
                "OMPI_COMM_WORLD_RANK=1",
                None,
                "OMPI_COMM_WORLD_SIZE is not",
            ),
            ("PMI_RANK=1 PMI_SIZE=2", Some(3), "--shards says 3"),
            ("PMI_RANK=x PMI_SIZE=2", None, "not a number"),
            // All four would do the first part, and nobody the others.
            ("SLURM_PROCID=0 SLURM_NTASKS=4", None, "start it by srun"),
            (
                "SLURM_ARRAY_TASK_ID=5 SLURM_ARRAY_TASK_MIN=1 SLURM_ARRAY_TASK_MAX=9 \
                 SLURM_ARRAY_TASK_COUNT=3",
                None,
                "has gaps",
            ),
            (
                "SLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_TASK_MIN=1 SLURM_ARRAY_TASK_MAX=2 SLURM_PROCID=1 \
                 SLURM_STEP_NUM_TASKS=2",
                None,
                "ambiguous",
            ),
        ] {
            let line = auto(env, count).expect_err(env);
            assert!(line.contains(why), "{env}: {line}");
        }
    }
}
