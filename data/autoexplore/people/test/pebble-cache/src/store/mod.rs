pub mod disk;
pub mod memory;

pub trait Store {
    fn load(&mut self, key: &[u8]) -> Option<Vec<u8>>;
    fn save(&mut self, key: &[u8], value: &[u8]);
}
