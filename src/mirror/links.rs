//! Anchors: `.mirrorfs/links/KEY` is a link to the dst inode that stands for a multi-link src inode.
//!
//! KEY is `INO-MOUNT-NLINK`, all hexadecimal: src's inode number, a hash of the path below SRC where
//! that inode's file system begins (never st_dev: it changes between boots and hosts), and src's
//! link count, which the mount reports while names are still to come.
//!
//! Lock order: `table` is a leaf; it is not held across system calls.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::sys::name::{Name, RelPath};
use crate::sys::stat::{self, Stat};
use crate::sys::{dir, fd};

/// Which src inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkKey {
    ino: u64,
    mount: u64,
}

impl LinkKey {
    /// The key of an inode that was seen below the mount (or subvolume) that begins at `mount`.
    pub fn new(src: &Stat, mount: &RelPath) -> LinkKey {
        LinkKey {
            ino: src.key.ino,
            mount: xxhash_rust::xxh3::xxh3_64(mount.as_bytes()),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Anchored {
    dst_ino: u64,
    src_nlink: u32,
}

#[derive(Debug, Default)]
struct Table {
    by_key: HashMap<LinkKey, Anchored>,
    by_ino: HashMap<u64, u32>,
}

/// All anchors.
#[derive(Debug)]
pub struct Anchors {
    table: Mutex<Table>,
}

impl Anchors {
    /// Reads `.mirrorfs/links`.
    pub fn load(links: &OwnedFd) -> Result<Anchors, Errno> {
        let mut table = Table::default();
        for entry in dir::list(links.as_fd())? {
            if let Some((key, src_nlink)) = parse(&entry.name) {
                table.by_key.insert(
                    key,
                    Anchored {
                        dst_ino: entry.ino,
                        src_nlink,
                    },
                );
                table.by_ino.insert(entry.ino, src_nlink);
            }
        }
        Ok(Anchors {
            table: Mutex::new(table),
        })
    }

    /// The anchor's name and dst inode, when src's inode has one.
    pub fn find(&self, key: LinkKey) -> Option<(Name, u64)> {
        let found = *self.table.lock().by_key.get(&key)?;
        Some((anchor_name(key, found.src_nlink)?, found.dst_ino))
    }

    /// Publishes a complete, still nameless inode as the one that stands for `key`.
    pub fn publish(
        &self,
        links: &OwnedFd,
        key: LinkKey,
        src_nlink: u32,
        file: std::os::fd::BorrowedFd<'_>,
    ) -> Result<(), Errno> {
        let name = anchor_name(key, src_nlink).ok_or(Errno::INVAL)?;
        fd::link_fd(file, links.as_fd(), name.as_cstr())?;
        let dst_ino = stat::stat_fd(file)?.key.ino;
        self.note(key, dst_ino, src_nlink);
        Ok(())
    }

    /// Somebody else has just published the key: takes over what is there.
    pub fn learn(&self, links: &OwnedFd, key: LinkKey, src_nlink: u32) -> Result<(), Errno> {
        let name = anchor_name(key, src_nlink).ok_or(Errno::INVAL)?;
        let dst_ino = stat::stat_at(links.as_fd(), name.as_cstr())?.key.ino;
        self.note(key, dst_ino, src_nlink);
        Ok(())
    }

    /// Publishes an inode that has a name already (symlinks and devices have no nameless form).
    pub fn publish_name(
        &self,
        links: &OwnedFd,
        key: LinkKey,
        src_nlink: u32,
        from: std::os::fd::BorrowedFd<'_>,
        name: &Name,
    ) -> Result<(), Errno> {
        let anchor = anchor_name(key, src_nlink).ok_or(Errno::INVAL)?;
        let flags = rustix::fs::AtFlags::empty();
        rustix::fs::linkat(from, name.as_cstr(), links.as_fd(), anchor.as_cstr(), flags)?;
        let dst_ino = stat::stat_at(from, name.as_cstr())?.key.ino;
        self.note(key, dst_ino, src_nlink);
        Ok(())
    }

    /// Forgets an anchor whose inode is to be made anew.
    pub fn withdraw(&self, links: &OwnedFd, key: LinkKey) -> Result<(), Errno> {
        let Some((name, dst_ino)) = self.find(key) else {
            return Ok(());
        };
        let mut table = self.table.lock();
        table.by_key.remove(&key);
        table.by_ino.remove(&dst_ino);
        drop(table);
        rustix::fs::unlinkat(links.as_fd(), name.as_cstr(), rustix::fs::AtFlags::empty())
    }

    /// The link count that the mount reports: src's while names are to come, without the anchor.
    pub fn nlink(&self, dst: &Stat) -> u32 {
        match self.table.lock().by_ino.get(&dst.key.ino) {
            Some(src_nlink) => dst.nlink.saturating_sub(1).max(*src_nlink),
            None => dst.nlink,
        }
    }

    fn note(&self, key: LinkKey, dst_ino: u64, src_nlink: u32) {
        let mut table = self.table.lock();
        table.by_key.insert(key, Anchored { dst_ino, src_nlink });
        table.by_ino.insert(dst_ino, src_nlink);
    }
}

fn anchor_name(key: LinkKey, src_nlink: u32) -> Option<Name> {
    Name::new(format!("{:x}-{:x}-{src_nlink:x}", key.ino, key.mount).as_bytes())
}

fn parse(name: &Name) -> Option<(LinkKey, u32)> {
    let text = std::str::from_utf8(name.as_bytes()).ok()?;
    let mut parts = text.split('-');
    let ino = u64::from_str_radix(parts.next()?, 16).ok()?;
    let mount = u64::from_str_radix(parts.next()?, 16).ok()?;
    let src_nlink = u32::from_str_radix(parts.next()?, 16).ok()?;
    Some((LinkKey { ino, mount }, src_nlink))
}
