//! Keep: what of an entry a copy keeps: everything, unless rsync's `--no-...` says otherwise.

/// What a copy keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// The permissions.
    pub perms: bool,
    /// mtime.
    pub times: bool,
    /// atime.
    pub atimes: bool,
    /// The owner.
    pub owner: bool,
    /// The group.
    pub group: bool,
    /// POSIX ACLs.
    pub acls: bool,
    /// All other xattrs.
    pub xattrs: bool,
    /// That several names are one inode.
    pub hard_links: bool,
    /// Holes.
    pub holes: bool,
    /// Symlinks; else they are left out.
    pub symlinks: bool,
    /// Devices; else they are left out.
    pub devices: bool,
    /// Fifos and sockets; else they are left out.
    pub specials: bool,
}

impl Keep {
    /// Everything.
    pub const ALL: Keep = Keep {
        perms: true,
        times: true,
        atimes: true,
        owner: true,
        group: true,
        acls: true,
        xattrs: true,
        hard_links: true,
        holes: true,
        symlinks: true,
        devices: true,
        specials: true,
    };

    /// All that can be said of one inode besides its type and its data.
    pub fn has_all_metadata(&self) -> bool {
        let links = Keep {
            hard_links: true,
            holes: true,
            symlinks: true,
            devices: true,
            specials: true,
            ..*self
        };
        links == Keep::ALL
    }
}
