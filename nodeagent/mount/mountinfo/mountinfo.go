// Package mountinfo reads what the kernel says of mounts. Unlike
// every look at a path, that never waits for a file system.
package mountinfo

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Mount is one line of mountinfo.
type Mount struct {
	ID, Parent int
	Dev        string // major:minor; one for each mounted FUSE file system
	Root       string // what of the file system is mounted; "/" is all of it
	Point      string
	ReadOnly   bool // this mount, not the file system
	Shared     bool
	FSType     string
	Source     string
}

// All mounts, in the order of mounting.
func All() ([]Mount, error) {
	data, err := os.ReadFile("/proc/thread-self/mountinfo") // fsop has threads with mounts of their own
	if err != nil {
		return nil, err
	}
	return parse(string(data)), nil
}

// At returns what is mounted at exactly this path, lowest first.
func At(path string) ([]Mount, error) {
	all, err := All()
	if err != nil {
		return nil, err
	}
	path = filepath.Clean(path)
	var at []Mount
	for _, m := range all {
		if m.Point == path {
			at = append(at, m)
		}
	}
	return at, nil
}

// parse skips lines it does not understand.
func parse(data string) []Mount {
	var all []Mount
	for line := range strings.Lines(data) {
		f := strings.Fields(line)
		if len(f) < 10 {
			continue
		}
		m := Mount{Dev: f[2], Root: unescape(f[3]), Point: unescape(f[4])}
		m.ID, _ = strconv.Atoi(f[0])
		m.Parent, _ = strconv.Atoi(f[1])
		for o := range strings.SplitSeq(f[5], ",") {
			m.ReadOnly = m.ReadOnly || o == "ro"
		}
		i := 6
		for ; i < len(f) && f[i] != "-"; i++ {
			m.Shared = m.Shared || strings.HasPrefix(f[i], "shared:")
		}
		if i+2 >= len(f) {
			continue
		}
		m.FSType, m.Source = f[i+1], unescape(f[i+2])
		all = append(all, m)
	}
	return all
}

// unescape undoes what the kernel does to space, tab, newline and backslash.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
