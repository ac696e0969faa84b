package containerd

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// minVersions are the first ones without known ways out of a container.
var minVersions = map[string]string{"containerd": "2.3.5", "runc": "1.2.8"}

func warnVersion(log *slog.Logger, name, have string) {
	if want := minVersions[name]; olderThan(have, want) || name == "runc" && strings.HasPrefix(strings.TrimPrefix(have, "v"), "1.3.") && olderThan(have, "1.3.3") {
		log.Warn("this version has known security holes; `make tools` builds a safe one",
			"program", name, "version", have, "want", want+" or newer")
	}
}

// olderThan compares dotted versions; what cannot be read is not older.
func olderThan(have, want string) bool {
	h, w := versionParts(have), versionParts(want)
	if h == nil || w == nil {
		return false
	}
	for i := range w {
		if h[i] != w[i] {
			return h[i] < w[i]
		}
	}
	return false
}

func versionParts(v string) []int {
	v = strings.TrimPrefix(v, "v")
	if i := strings.IndexAny(v, "-+~ "); i >= 0 {
		v = v[:i]
	}
	out := make([]int, 3)
	for i, p := range strings.SplitN(v, ".", 3) {
		n, err := strconv.Atoi(p)
		if err != nil {
			return nil
		}
		out[i] = n
	}
	return out
}

// cgroupV2 says whether the machine is on the unified hierarchy only.
var cgroupV2 = sync.OnceValue(func() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
})

// swapAccounting says whether a swap limit can be set. On cgroup v1 that is a
// boot option; on v2 runc ignores "no swap" where there is none.
var swapAccounting = sync.OnceValue(func() bool {
	if cgroupV2() {
		return true
	}
	_, err := os.Stat("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
	return err == nil
})

// openFiles is the limit of open files that a container gets: ours, because
// root of a user namespace cannot raise it further.
func openFiles() uint64 {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) != nil {
		return 1024
	}
	return min(lim.Max, 1<<20)
}

// cgroupParent is ours alone: the namespace and a session's id may be the same
// in another containerd of this machine.
func (r *Runtime) cgroupParent() string {
	sum := sha256.Sum256([]byte(r.cfg.Address))
	return "/" + r.cfg.Namespace + "-" + hex.EncodeToString(sum[:4])
}

func (r *Runtime) cgroupPath(session string) string {
	return r.cgroupParent() + "/" + session
}

// removeCgroups removes the parent, which runc leaves, from every hierarchy.
func (r *Runtime) removeCgroups() error {
	dirs, err := filepath.Glob("/sys/fs/cgroup/*" + r.cgroupParent())
	if err != nil {
		return err
	}
	for _, d := range append(dirs, "/sys/fs/cgroup"+r.cgroupParent()) {
		if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// runcRoot is where runc keeps its state. The default is one folder for all
// containerds of the machine, by namespace and id; beside the socket it is the
// same for a system's containerd and our own for a private one.
func (r *Runtime) runcRoot() string {
	return filepath.Join(filepath.Dir(r.cfg.Address), "runc")
}

// oomKills reads how often the kernel killed in the session's cgroup. It is
// read from the cgroup, not counted from events: one kill can raise thousands
// of events on cgroup v1, and none reach a daemon that is restarting.
func (r *Runtime) oomKills(session string) int {
	path := filepath.Join("/sys/fs/cgroup/memory", r.cgroupPath(session), "memory.oom_control")
	if cgroupV2() {
		path = filepath.Join("/sys/fs/cgroup", r.cgroupPath(session), "memory.events")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(v))
			return n
		}
	}
	return 0
}

// resolvConf returns the machine's name servers. A stub resolver on loopback
// is of no use inside a container, so the list behind it is taken.
func resolvConf() (string, error) {
	paths := []string{
		"/etc/resolv.conf",
		"/run/systemd/resolve/resolv.conf",        // systemd-resolved
		"/run/NetworkManager/no-stub-resolv.conf", // NetworkManager with dnsmasq
	}
	for _, p := range paths {
		data, err := os.ReadFile(p)
		if err != nil {
			continue
		}
		if out, ok := withoutLoopback(string(data)); ok {
			return out, nil
		}
	}
	return "", fmt.Errorf("no name server in %s is reachable from a container; put one there that is not on loopback", strings.Join(paths, ", "))
}

func withoutLoopback(conf string) (string, bool) {
	var out strings.Builder
	found := false
	for line := range strings.Lines(conf) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "nameserver" {
			if strings.HasPrefix(f[1], "127.") || f[1] == "::1" {
				continue
			}
			found = true
		}
		out.WriteString(line)
	}
	return out.String(), found
}

// stopwatch notes how long the steps of a start took.
type stopwatch struct {
	last time.Time
	laps []slog.Attr
}

func newStopwatch() *stopwatch { return &stopwatch{last: time.Now()} }

func (s *stopwatch) lap(name string) {
	now := time.Now()
	s.laps = append(s.laps, slog.Duration(name, now.Sub(s.last)))
	s.last = now
}

// LogValue implements slog.LogValuer.
func (s *stopwatch) LogValue() slog.Value { return slog.GroupValue(s.laps...) }
