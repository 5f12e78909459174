// Remembers looked-up names for 300 seconds, a common wish: the value carries its deadline.
use std::time::{Duration, Instant};

fn main() {
    let lives = Duration::from_secs(300);
    let entry = ("some name", Instant::now() + lives);
    if entry.1 > Instant::now() {
        println!("{} is still good", entry.0);
    }
}
