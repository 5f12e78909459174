/// What can go wrong.
#[derive(Debug)]
pub enum Error {
    /// Another process has the directory open.
    Busy,
    /// The checksum of a segment does not match.
    Damaged(u64),
    Io(std::io::Error),
}
