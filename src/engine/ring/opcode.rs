//! Opcode: the one table of what the ring makes. Pure.
//!
//! Each row: the kernel's number for it, the kernel that brought it, the system call that does the
//! same. A kernel without the row's opcode, or a caller who switched it off, gets the call.

use io_uring::opcode;

/// One io_uring opcode that this layer uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // Each is its row in the table.
pub enum Opcode {
    OpenAt2,
    Statx,
    Read,
    Write,
    ReadFixed,
    WriteFixed,
    Fsync,
    Fallocate,
    Fadvise,
    Close,
    Splice,
    RenameAt,
    UnlinkAt,
    MkdirAt,
    SymlinkAt,
    LinkAt,
    FGetXattr,
    FSetXattr,
    Ftruncate,
}

/// A row.
#[derive(Debug)]
pub struct Row {
    /// Which opcode.
    pub opcode: Opcode,
    /// The kernel's number: what IORING_REGISTER_PROBE is asked for.
    pub code: u8,
    /// Its name, as in MIRRORFS_RING_OFF.
    pub name: &'static str,
    /// The first kernel that has it: major, minor.
    pub since: (u8, u8),
    /// The system call that does the same, made where the opcode is missing or switched off.
    pub call: &'static str,
    /// Works on a slot (a direct descriptor) too.
    pub slot: bool,
}

macro_rules! table {
    ($($opcode:ident $code:ident $name:literal $major:literal.$minor:literal $call:literal $slot:literal;)*) => {
        &[$(Row {
            opcode: Opcode::$opcode,
            code: opcode::$code::CODE,
            name: $name,
            since: ($major, $minor),
            call: $call,
            slot: $slot,
        }),*]
    };
}

#[rustfmt::skip]
const TABLE: &[Row] = table! {
    OpenAt2    OpenAt2    "openat2"     5 . 6  "openat2(2)"       true;
    Statx      Statx      "statx"       5 . 6  "statx(2)"         false;
    Read       Read       "read"        5 . 6  "pread(2)"         true;
    Write      Write      "write"       5 . 6  "pwrite(2)"        true;
    ReadFixed  ReadFixed  "read_fixed"  5 . 1  "pread(2)"         true;
    WriteFixed WriteFixed "write_fixed" 5 . 1  "pwrite(2)"        true;
    Fsync      Fsync      "fsync"       5 . 1  "fsync(2)"         true;
    Fallocate  Fallocate  "fallocate"   5 . 6  "fallocate(2)"     true;
    Fadvise    Fadvise    "fadvise"     5 . 6  "posix_fadvise(2)" true;
    Close      Close      "close"       5 . 6  "close(2)"         true;
    Splice     Splice     "splice"      5 . 7  "splice(2)"        true;
    RenameAt   RenameAt   "renameat"    5 . 11 "renameat2(2)"     false;
    UnlinkAt   UnlinkAt   "unlinkat"    5 . 11 "unlinkat(2)"      false;
    MkdirAt    MkDirAt    "mkdirat"     5 . 15 "mkdirat(2)"       false;
    SymlinkAt  SymlinkAt  "symlinkat"   5 . 15 "symlinkat(2)"     false;
    LinkAt     LinkAt     "linkat"      5 . 15 "linkat(2)"        false;
    FGetXattr  FGetXattr  "fgetxattr"   5 . 19 "fgetxattr(2)"     false;
    FSetXattr  FSetXattr  "fsetxattr"   5 . 19 "fsetxattr(2)"     false;
    Ftruncate  Ftruncate  "ftruncate"   6 . 9  "ftruncate(2)"     true;
};

impl Opcode {
    /// Every row, oldest kernel first but for the two of 5.1.
    pub fn table() -> &'static [Row] {
        TABLE
    }

    /// The opcode's row.
    pub fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }
}

/// A set of opcodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Opcodes(u32);

impl Opcodes {
    /// None of them.
    pub const NONE: Opcodes = Opcodes(0);

    /// All of them.
    pub fn all() -> Opcodes {
        TABLE.iter().map(|row| row.opcode).collect()
    }

    /// True when the set has it.
    pub fn has(self, opcode: Opcode) -> bool {
        self.0 & 1 << opcode as u32 != 0
    }

    /// What is in this set and not in `other`.
    #[must_use]
    pub fn without(self, other: Opcodes) -> Opcodes {
        Opcodes(self.0 & !other.0)
    }

    /// True when everything that works on a slot is in the set.
    pub(super) fn keeps_slots(self) -> bool {
        TABLE
            .iter()
            .filter(|row| row.slot)
            .all(|r| self.has(r.opcode))
    }

    /// From names as in the table, with commas between; `all` is all of them. `None`: not a name.
    pub fn parse(text: &str) -> Option<Opcodes> {
        let names = text.split(',').map(str::trim).filter(|n| !n.is_empty());
        names.into_iter().try_fold(Opcodes::NONE, |set, name| {
            let found = match name {
                "all" => Opcodes::all(),
                _ => {
                    let row = TABLE.iter().find(|row| row.name == name)?;
                    Opcodes::from(row.opcode)
                }
            };
            Some(Opcodes(set.0 | found.0))
        })
    }
}

impl From<Opcode> for Opcodes {
    fn from(opcode: Opcode) -> Opcodes {
        Opcodes(1 << opcode as u32)
    }
}

impl FromIterator<Opcode> for Opcodes {
    fn from_iter<I: IntoIterator<Item = Opcode>>(all: I) -> Opcodes {
        Opcodes(all.into_iter().fold(0, |set, o| set | 1 << o as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_where_its_opcode_says() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.opcode as usize, i, "{}", row.name);
            assert_eq!(Opcode::row(row.opcode).name, row.name);
            assert_eq!(Opcodes::parse(row.name), Some(row.opcode.into()));
        }
    }

    #[test]
    fn sets_add_and_take_away() {
        let two = Opcodes::parse(" read, fsync ,").expect("names");
        assert!(two.has(Opcode::Read) && two.has(Opcode::Fsync) && !two.has(Opcode::Write));
        let rest = Opcodes::all().without(two);
        assert!(!rest.has(Opcode::Read) && rest.has(Opcode::Write));
        assert_eq!(Opcodes::parse("all"), Some(Opcodes::all()));
        assert_eq!(Opcodes::parse("read,sync"), None);
        assert_eq!(Opcodes::parse(""), Some(Opcodes::NONE));
    }

    #[test]
    fn slots_are_the_kernels_only_with_everything_that_works_on_them() {
        let all = Opcodes::all();
        assert!(all.keeps_slots());
        assert!(all.without(Opcode::Statx.into()).keeps_slots());
        assert!(!all.without(Opcode::Ftruncate.into()).keeps_slots());
    }
}
