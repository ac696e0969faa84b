package process

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
)

// rotate bounds a log that somebody else is writing to: its content moves to
// <path>.1, and the file, which is open for appending, starts over. A line that is
// printed in between is lost.
func (m *Mounter) rotate(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if size(path) <= m.cfg.LogBytes {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Seek(-m.cfg.LogBytes, io.SeekEnd); err != nil {
		return err
	}
	old, err := os.OpenFile(path+".1", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(old, io.LimitReader(f, m.cfg.LogBytes))
	return errors.Join(err, old.Close(), os.Truncate(path, 0))
}

// boundLog has the kernel bound the log of a program that has not started yet.
func (m *Mounter) boundLog(pid int) error {
	b, ok := m.Driver.(LogBounder)
	if !ok {
		return nil
	}
	n := uint64(b.MaxLogBytes())
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: n, Max: n}, nil); err != nil {
		return fmt.Errorf("bounding its log: %w", err)
	}
	return nil
}

func size(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return fi.Size()
}

// Since returns what was printed to a log from an offset on, at most the last n bytes.
func Since(path string, from, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if end := size(path); end-from > n {
		from = end - n
	}
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, n))
}

// words returns the last of what the program has said since, without keys.
func (m *Mounter) words(path string, from int64, s mount.Spec) string {
	data, err := Since(path, from, wordsBytes)
	if err != nil {
		return ""
	}
	var said []string
	for line := range strings.Lines(string(data)) {
		w := strings.TrimSpace(m.Words(strings.TrimSpace(line)))
		if w == "" || len(said) > 0 && said[len(said)-1] == w {
			continue
		}
		if len(w) > maxWordsBytes {
			w = w[:maxWordsBytes] + "…"
		}
		said = append(said, w)
	}
	if len(said) > maxWords {
		said = said[len(said)-maxWords:]
	}
	text := strings.ToValidUTF8(strings.Join(said, "; "), "?")
	return strings.NewReplacer(s.SecretAccessKey, "***", s.AccessKeyID, "***").Replace(text)
}
