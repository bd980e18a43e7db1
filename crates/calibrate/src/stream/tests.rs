//! Streams keep what is written, wherever it lies.

use super::*;

#[test]
fn a_stream_keeps_what_was_written_in_memory_and_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [StreamKind::Bf16, StreamKind::F32] {
        let mut files = Vec::new();
        for budget in [0, u64::MAX] {
            let s = Stream::new(kind, 3, 4, 5, budget, &dir.path().join("spill")).unwrap();
            assert_eq!(s.spilled(), budget == 0);
            let zeros = dir.path().join("zeros");
            s.save(&zeros).unwrap();
            let zeros = std::fs::read(zeros).unwrap();
            assert!(s.read(1).unwrap() == [0.0; 20] && zeros.iter().all(|&b| b == 0));
            assert_eq!(zeros.len() as u64, Stream::bytes(kind, 3, 4, 5));
            for w in 0..3 {
                s.write(w, &(0..20).map(|i| (w * 20 + i) as f32 * 0.5).collect::<Vec<_>>()).unwrap();
            }
            assert_eq!(s.read(2).unwrap()[3], 21.5);
            let part = s.read(1).unwrap()[5..15].to_vec();
            assert_eq!(s.read_tokens(1, 1..3).unwrap(), part);
            assert_eq!(widened(&s.read_rounded(1, 1..3).unwrap()), widened(&narrowed(&part)));
            let apart = Stream::new(kind, 1, 4, 5, budget, &dir.path().join("apart")).unwrap();
            apart.write_tokens(0, 0, &[1.0; 10]).unwrap();
            apart.write_tokens(0, 2, &[2.0; 10]).unwrap();
            apart.write_tokens(0, 1, &[3.0; 5]).unwrap();
            assert_eq!(apart.read(0).unwrap(), [[1.0; 5], [3.0; 5], [2.0; 5], [2.0; 5]].as_flattened());
            let saved = dir.path().join(format!("saved-{budget}"));
            let file = s.save(&saved).unwrap();
            file.sync().unwrap();
            files.push(std::fs::read(&saved).unwrap());
            let again = Stream::new(kind, 3, 4, 5, budget, &dir.path().join("spill-2")).unwrap();
            assert_eq!(again.load(&saved).unwrap(), file.fingerprint());
            assert_eq!(again.read(1).unwrap(), s.read(1).unwrap());
            assert_ne!(again.load(&dir.path().join("zeros")).unwrap(), file.fingerprint());
            again.load(&saved).unwrap();
            assert!(Stream::new(kind, 3, 4, 6, budget, &dir.path().join("spill-3")).unwrap().load(&saved).is_err());
        }
        assert_eq!(files[0], files[1]);
        assert!(!dir.path().join("spill").exists(), "a spill file goes with its stream");
    }
}

#[test]
fn spare_memory_goes_from_window_to_window_and_starts_as_zeros() {
    let (dir, spare) = (tempfile::tempdir().unwrap(), Arc::new(Spare::default()));
    let lengths = [3, 1];
    let stream = |width| {
        let new = Stream::of_lengths(StreamKind::Bf16, &lengths, width, u64::MAX, &dir.path().join("spill"));
        new.unwrap().within(&spare, 8)
    };
    let spares = || spare.windows.lock().unwrap().iter().map(Vec::capacity).collect::<Vec<_>>();
    let (narrow, wide) = (stream(2), stream(8));
    narrow.write(0, &[2.0; 6]).unwrap();
    narrow.write(1, &[3.0; 2]).unwrap();
    narrow.release(0);
    assert_eq!((spares(), narrow.read(0).unwrap()), (vec![24], vec![0.0; 6]));
    wide.write_tokens(0, 0, &[4.0; 8]).unwrap();
    assert!(spares().is_empty(), "of one window for another");
    wide.write_tokens(0, 1, &[5.0; 16]).unwrap();
    assert_eq!(wide.read(0).unwrap(), [[4.0; 8], [5.0; 8], [5.0; 8]].as_flattened());
    drop((narrow, wide));
    let mut left = spares();
    left.sort();
    assert_eq!(left, [8, 24]);
    let other = stream(4);
    assert!(other.read(0).unwrap() == [0.0; 12] && other.read(1).unwrap() == [0.0; 4]);
    other.write(1, &[1.0; 4]).unwrap();
    assert_eq!((spares().len(), other.read(1).unwrap()), (1, vec![1.0; 4]));
}

#[test]
fn what_is_consumed_meanwhile_comes_in_the_same_batches() {
    let run = |threads: usize, most: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut all = Vec::new();
        let compute = |w: usize| Ok::<_, ()>(w * w);
        let take = |first, results| {
            all.push((first, results));
            Ok(())
        };
        pool.install(|| overlapped(23, (4, most), compute, take)).unwrap();
        all
    };
    let expected: Vec<(usize, Vec<usize>)> =
        (0..23).step_by(4).map(|first| (first, (first..23.min(first + 4)).map(|w| w * w).collect())).collect();
    for (threads, most) in [(1, 1), (2, 2), (7, 1), (7, 2), (9, 9)] {
        assert_eq!(run(threads, most), expected);
    }
    let fails = overlapped(23, (4, 1), |w| if w == 9 { Err(w) } else { Ok(w) }, |_, _| Ok(()));
    assert_eq!(fails, Err(9));
    let fails = overlapped(23, (4, 1), Ok, |first, _| if first == 8 { Err(first) } else { Ok(()) });
    assert_eq!(fails, Err(8));
    overlapped(0, (4, 1), Ok::<_, ()>, |_, _| panic!("no window")).unwrap();
}

#[test]
fn windows_of_unequal_length_do_not_touch() {
    let dir = tempfile::tempdir().unwrap();
    let lengths = [3, 1, 7];
    for budget in [0, u64::MAX] {
        let s = Stream::of_lengths(StreamKind::F32, &lengths, 2, budget, &dir.path().join("spill")).unwrap();
        for (w, length) in lengths.iter().enumerate() {
            s.write(w, &vec![w as f32 + 1.0; length * 2]).unwrap();
        }
        let saved = dir.path().join(format!("saved-{budget}"));
        s.save(&saved).unwrap();
        let again = Stream::of_lengths(StreamKind::F32, &lengths, 2, budget, &dir.path().join("again")).unwrap();
        again.load(&saved).unwrap();
        for (w, length) in lengths.iter().enumerate() {
            assert_eq!(s.read(w).unwrap(), vec![w as f32 + 1.0; length * 2]);
            assert_eq!(again.read(w).unwrap(), s.read(w).unwrap());
        }
    }
}

#[test]
fn tokens_that_come_by_columns_are_those_that_come_by_rows() {
    let dir = tempfile::tempdir().unwrap();
    let stream = |kind, budget| Stream::new(kind, 2, 5, 70, budget, &dir.path().join("spill")).unwrap();
    let (rows, columns) = (stream(StreamKind::Bf16, u64::MAX), stream(StreamKind::Bf16, u64::MAX));
    assert!(!stream(StreamKind::Bf16, 0).takes_columns() && !stream(StreamKind::F32, u64::MAX).takes_columns());
    assert!(columns.takes_columns());
    let values: Vec<f32> = (0..5 * 70).map(|i| (i as f32 * 0.7).sin()).collect();
    rows.write(1, &values).unwrap();
    for tokens in [0..2, 2..5] {
        let some = &values[tokens.start * 70..tokens.end * 70];
        let make = |write: &mut dyn FnMut(&[f32])| -> Result<(), ()> {
            for part in [0..32, 32..64, 64..70] {
                write(&some.chunks(70).flat_map(|row| row[part.clone()].to_vec()).collect::<Vec<_>>());
            }
            Ok(())
        };
        columns.write_columns(1, tokens.clone(), make).unwrap();
    }
    assert_eq!(columns.read(1).unwrap(), rows.read(1).unwrap());
    assert_eq!(columns.write_columns(0, 0..5, |_| Err(7)), Err(7));
    assert_eq!(columns.read(0).unwrap(), [0.0; 5 * 70], "what was not finished is not there");
}
