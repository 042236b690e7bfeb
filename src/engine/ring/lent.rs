//! Lent: heap memory of ours that the kernel has a pointer to.
//!
//! A `Box` that moves may invalidate the pointers that were made from it (Rust counts a moved Box as
//! the only way to its memory). So the slab keeps what it lends as the pointer itself: the kernel's
//! copy and ours are the same, wherever the value moves, and it becomes a Box again when the kernel
//! is done.

use std::ptr::NonNull;

/// Memory that is ours to free and, until the completion, the kernel's to use.
pub(super) struct Lent<T: ?Sized>(NonNull<T>);

impl<T: ?Sized> Lent<T> {
    /// For the kernel; valid until this is dropped or taken back.
    pub(super) fn as_ptr(&self) -> *mut T {
        self.0.as_ptr()
    }

    /// The value; only after the kernel is done with it.
    pub(super) fn take(self) -> Box<T> {
        let pointer = self.0.as_ptr();
        std::mem::forget(self);
        // SAFETY: the pointer came from a Box (`from`), and `self`, its only owner, is forgotten.
        unsafe { Box::from_raw(pointer) }
    }
}

impl<T: ?Sized> From<Box<T>> for Lent<T> {
    fn from(value: Box<T>) -> Lent<T> {
        Lent(NonNull::from(Box::leak(value)))
    }
}

impl<T: ?Sized> Drop for Lent<T> {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a Box (`from`), and nobody took it back (`take` forgets us).
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::super::slab::Slab;
    use super::*;

    #[test]
    fn a_pointer_stays_good_while_its_owner_moves() {
        let mut slab = Slab::with_capacity(0);
        let mut kernel = Vec::new();
        for i in 0..100u64 {
            let block: Lent<[u64; 4]> = Box::new([i; 4]).into();
            let name: Lent<std::ffi::CStr> = CString::new(format!("{i}"))
                .expect("no NUL")
                .into_boxed_c_str()
                .into();
            let (to, from) = (block.as_ptr(), name.as_ptr());
            kernel.push((slab.insert((block, name)), to, from, i)); // Moves, and the slab grows.
        }
        for (_, to, from, i) in &kernel {
            // SAFETY: as the kernel does: writes and reads what the slab owns.
            unsafe {
                (**to)[1] = i * 2;
                assert_eq!((**from).to_bytes(), format!("{i}").as_bytes());
            }
        }
        for (key, _, _, i) in kernel {
            let (block, name) = slab.remove(key).expect("the value");
            assert_eq!(*block.take(), [i, i * 2, i, i]);
            assert_eq!(name.take().to_bytes(), format!("{i}").as_bytes());
        }
    }

    #[test]
    fn what_is_not_taken_back_is_freed() {
        let value = std::rc::Rc::new(());
        let lent: Lent<_> = Box::new(std::rc::Rc::clone(&value)).into();
        drop(lent);
        assert_eq!(std::rc::Rc::strong_count(&value), 1);
    }
}
