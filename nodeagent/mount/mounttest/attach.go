package mounttest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/mountinfo"
)

// container is a process with mounts, and perhaps users, of its own, in which a
// folder of the host is bound as a container's is: recursively, as a slave.
type container struct {
	e   *env
	pid int
	dir string // where the folder is inside
}

// startContainer ends with the test.
func (e *env) startContainer(source string, userNS bool) *container {
	e.Helper()
	c := &container{e: e, dir: filepath.Join(filepath.Dir(source), "inside-"+strconv.FormatBool(userNS))}
	e.must(os.Mkdir(c.dir, 0o755))
	cmd := exec.Command("sh", "-ec", `mount --make-rslave /; mount --rbind "$1" "$2"; mount --make-rslave "$2"; echo ready; read -r end || :`, "sh", source, c.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	if userNS {
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: testUID, Size: 65536}}
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = ids, ids
		cmd.SysProcAttr.GidMappingsEnableSetgroups = true
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 0, Gid: 0}
	}
	cmd.Stderr = e.Output()
	in, err := cmd.StdinPipe()
	e.must(err)
	out, err := cmd.StdoutPipe()
	e.must(err)
	e.must(cmd.Start())
	c.pid = cmd.Process.Pid
	e.Cleanup(func() {
		_ = in.Close()
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		e.Fatalf("container: %q, %v", line, err)
	}
	return c
}

// sh runs a command in the folder inside; ls says best why that cannot be entered. It may hang there, not here.
func (c *container) sh(script string) (string, error) {
	ctx, cancel := context.WithTimeout(c.e.ctx, 10*time.Second)
	defer cancel()
	args := []string{"--target", strconv.Itoa(c.pid), "--mount"}
	if fi, err := os.Stat(fmt.Sprintf("/proc/%d", c.pid)); err == nil && fi.Sys().(*syscall.Stat_t).Uid == testUID {
		args = append(args, "--user", "--setuid", "0", "--setgid", "0")
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(args, "sh", "-c", `cd "$1" 2>/dev/null || exec ls "$1"; eval "$2"`, "sh", c.dir, script)...)
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (c *container) want(script, output string) {
	c.e.Helper()
	out, err := c.sh(script)
	if err != nil || out != output {
		c.e.Fatalf("inside, %q says %q, %v; want %q", script, out, err, output)
	}
}

func (c *container) wantFailure(script, words string) {
	c.e.Helper()
	out, err := c.sh(script)
	if err == nil || !strings.Contains(out, words) {
		c.e.Fatalf("inside, %q says %q, %v; want a failure with %q", script, out, err, words)
	}
}

// testAttached is what a session with a running container is: the mount comes to
// it, dies under it, and comes back.
func testAttached(e *env) {
	vol := filepath.Join(e.TempDir(), "vol")
	target := filepath.Join(vol, "s3")
	e.spec.Point = filepath.Join(vol, "mnt")
	e.must(os.MkdirAll(filepath.Join(target, ".opencode/data"), 0o755))
	e.must(os.MkdirAll(filepath.Join(target, ".opencode/state"), 0o755))
	e.must(os.WriteFile(filepath.Join(target, ".opencode/data/db"), []byte("local"), 0o644))
	e.must(filepath.WalkDir(target, func(path string, _ os.DirEntry, err error) error {
		if err == nil {
			err = os.Chown(path, testUID, testGID)
		}
		return err
	}))
	e.must(unix.Mount(vol, vol, "", unix.MS_BIND, ""))
	e.Cleanup(func() { _ = unix.Unmount(vol, unix.MNT_DETACH) })
	e.must(unix.Mount("", vol, "", unix.MS_SHARED, ""))
	// The temporary folders' root must let others through.
	for dir := vol; dir != "/"; dir = filepath.Dir(dir) {
		fi, err := os.Stat(dir)
		e.must(err)
		e.must(os.Chmod(dir, fi.Mode()|0o755))
	}

	plain, users := e.startContainer(target, false), e.startContainer(target, true)
	both := []*container{plain, users}
	for _, c := range both {
		c.want("cat .opencode/data/db", "local")
	}

	e.mount()
	e.write("hello", "from the bucket")
	e.write(".cloudcode/secret", "state of all sessions")
	over := []mount.Bind{
		{Source: filepath.Join(target, ".opencode/data"), Target: ".opencode/data"},
		{Source: filepath.Join(target, ".opencode/state"), Target: ".opencode/state"},
		{Target: ".cloudcode"},
	}
	attach := func() {
		e.Helper()
		e.took("AttachTree", func() error { return mount.AttachTree(e.ctx, e.spec.Point, target, over) })
	}
	attach()
	check := func() {
		e.Helper()
		for _, c := range both {
			c.want("cat hello", "from the bucket")
			c.want("cat .opencode/data/db", "local")
			c.want("ls -A .cloudcode", "")
			c.wantFailure("echo x > .cloudcode/x", "Read-only")
			c.wantFailure("mkdir .cloudcode/x", "Read-only")
		}
		users.want("stat -c %u:%g . .opencode .opencode/data", "0:0\n0:0\n0:0")
	}
	check()
	users.want("echo new > from-inside && mkdir -p d && echo x > d/f && cat from-inside", "new")
	plain.want("cat from-inside", "new")
	users.want("echo two >> .opencode/data/db; echo x > .opencode/state/s", "")
	if data, err := os.ReadFile(filepath.Join(e.spec.Point, ".opencode/data/db")); err == nil {
		e.Errorf("what is local went to the mount: %q", data)
	}

	// Nothing changes if it is there already: a daemon that restarts says it again.
	before := mountIDs(e, target)
	attach()
	if after := mountIDs(e, target); !slices.Equal(before, after) {
		e.Errorf("attached again although it was there: mounts %v, now %v", before, after)
	}
	e.wantErr(e.m.Unmount(e.ctx, e.spec.ID), mount.ErrBusy, target)
	e.must(e.m.Sync(e.ctx, e.spec.ID))

	for round := range 2 {
		e.kill(e.pid(), syscall.SIGKILL)
		for _, c := range both {
			e.eventually("the mount is dead inside", func() error {
				if out, err := c.sh("cat hello"); err == nil || !strings.Contains(out, "not connected") {
					return fmt.Errorf("cat says %q, %v", out, err)
				}
				return nil
			})
		}
		if round == 1 {
			e.must(mount.Detach(target)) // the owner may do that first
		}
		e.must(e.remount())
		attach()
		for _, c := range both {
			c.want("cat hello", "from the bucket")
			c.want("cat from-inside", "new")
			c.want("cat .opencode/data/db", "localtwo")
			c.want("ls -A .cloudcode", "")
		}
	}

	// Containers decide where symlinks lead; nobody may follow them.
	if _, err := users.sh("ln -s /etc link"); err == nil { // not every mounter has symlinks
		err := mount.AttachTree(e.ctx, e.spec.Point, target, append(slices.Clone(over), mount.Bind{Source: filepath.Join(target, ".opencode/state"), Target: "link/x"}))
		if err == nil {
			e.Error("something was mounted behind a symlink")
		}
		if _, err := os.Stat("/etc/x"); err == nil {
			e.Error("a folder was made behind a symlink")
		}
	}
	attach()

	// With it detached, the container sees its own folder again and holds nothing.
	e.must(mount.Detach(target))
	for _, c := range both {
		c.want("ls -A", ".opencode")
		c.want("cat .opencode/data/db", "localtwo")
	}
	users.want("rm -r .opencode/state && ln -s /etc .opencode/state && echo ok", "ok")
	if err := mount.AttachTree(e.ctx, e.spec.Point, target, over); err == nil {
		e.Error("a symlink's target was mounted into the container")
	}
	e.must(mount.Detach(target))
	e.must(mount.Detach(target))
	e.must(e.m.Unmount(e.ctx, e.spec.ID))
	e.wantObjects(map[string]string{"hello": "from the bucket", "from-inside": "new\n", "d/f": "x\n"})
}

func mountIDs(e *env, below string) []int {
	all, err := mountinfo.All()
	e.must(err)
	var ids []int
	for _, m := range all {
		if m.Point == below || strings.HasPrefix(m.Point, below+"/") {
			ids = append(ids, m.ID)
		}
	}
	return ids
}
