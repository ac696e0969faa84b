package nodeagent

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	goruntime "runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

var notInLabel = regexp.MustCompile(`[^a-z0-9-]+`)

// HostID makes a DNS label of the machine's host name.
func HostID() (string, error) {
	host, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("read the host name: %w (name the node with --node-id)", err)
	}
	id, _, _ := strings.Cut(strings.ToLower(host), ".")
	id = strings.Trim(notInLabel.ReplaceAllString(id, "-"), "-")
	if len(id) > 63 {
		id = strings.TrimRight(id[:63], "-")
	}
	if id == "" {
		return "", fmt.Errorf("the host name %q gives no node id: name the node with --node-id", host)
	}
	return id, nil
}

// instanceID reads the random id that is kept in a file, or makes it.
func instanceID(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err == nil && len(data) > 0 {
		return strings.TrimSpace(string(data)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	id := rand.Text()
	return id, atomicfile.Write(path, []byte(id+"\n"), 0o600)
}

// machineInfo describes this machine. What cannot be read stays zero: unknown.
func machineInfo(dir string) *cloudcodev1.NodeInfo {
	info := &cloudcodev1.NodeInfo{
		Os: goruntime.GOOS, Architecture: goruntime.GOARCH, CpuMillis: int64(goruntime.NumCPU()) * 1000,
	}
	if host, err := os.Hostname(); err == nil {
		info.Hostname = host
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		info.KernelVersion = unix.ByteSliceToString(uts.Release[:])
	}
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) == nil {
		info.MemoryBytes = int64(si.Totalram) * int64(si.Unit)
	}
	var fs unix.Statfs_t
	if unix.Statfs(dir, &fs) == nil {
		info.DiskBytes = int64(fs.Blocks) * fs.Bsize
	}
	return info
}
