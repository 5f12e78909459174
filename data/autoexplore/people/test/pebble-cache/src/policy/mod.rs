pub mod clock;
pub mod lru;

pub trait Policy<K> {
    fn insert(&mut self, key: K);
    fn touched(&mut self, key: &K);
    fn victim(&mut self) -> Option<K>;
}
