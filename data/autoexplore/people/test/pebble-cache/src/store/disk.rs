use std::fs::File;
use std::io::Write;

// fsync after 256 writes, or when dropped: a lost entry is only a slow answer.
const SYNC_EVERY: u32 = 256;

pub struct Disk {
    file: File,
    unsynced: u32,
}

impl Disk {
    pub fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.unsynced += 1;
        if self.unsynced >= SYNC_EVERY {
            self.file.sync_data()?;
            self.unsynced = 0;
        }
        Ok(())
    }
}
