package runtime

import (
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
)

const (
	// IDMapSize is how many uids and gids each container has.
	IDMapSize = 65536
	// minMemory is less than what any container runtime needs to start one.
	minMemory = 16 << 20
)

var (
	sessionName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)
	envName     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*$`)
	hostName    = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$`)
)

// ValidSession says whether a session id can name a container. Ids become host
// names and parts of paths.
func ValidSession(id string) bool { return sessionName.MatchString(id) && !strings.Contains(id, "--") }

// ValidateSpec refuses what cannot run on any machine.
func ValidateSpec(s Spec) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: %s", ErrInvalidSpec, fmt.Sprintf(format, a...))
	}
	switch {
	case !ValidSession(s.Session):
		return bad("session %q is not a DNS label of at most 40 characters without \"--\"", s.Session)
	case s.Image == "":
		return bad("no image given")
	case s.Hostname != "" && !hostName.MatchString(s.Hostname):
		return bad("hostname %q", s.Hostname)
	case s.IDBase < IDMapSize:
		return bad("id base %d would map to the machine's own users; the smallest is %d", s.IDBase, IDMapSize)
	case s.IDBase > 1<<32-1-IDMapSize:
		return bad("id base %d leaves no room for %d ids", s.IDBase, IDMapSize)
	case !filepath.IsAbs(s.LogDir):
		return bad("log folder %q is not an absolute path", s.LogDir)
	case s.ScratchDir != "" && !filepath.IsAbs(s.ScratchDir):
		return bad("scratch folder %q is not an absolute path", s.ScratchDir)
	case strings.ContainsAny(s.ScratchDir, ",:\\"):
		return bad("scratch folder %q: overlayfs takes no comma, colon or backslash", s.ScratchDir)
	case s.WorkingDir != "" && !filepath.IsAbs(s.WorkingDir):
		return bad("working folder %q is not an absolute path", s.WorkingDir)
	case s.Resources.CPUMillis < 0 || s.Resources.MemoryBytes < 0 || s.Resources.PIDs < 0:
		return bad("negative limit")
	case s.Resources.CPUMillis > 0 && s.Resources.CPUMillis < 10:
		return bad("CPU limit of %dm is below 10m", s.Resources.CPUMillis)
	case s.Resources.MemoryBytes > 0 && s.Resources.MemoryBytes < minMemory:
		return bad("memory limit of %d bytes is below %d MiB", s.Resources.MemoryBytes, minMemory>>20)
	}
	for k, v := range s.Env {
		if !envName.MatchString(k) || strings.ContainsRune(v, 0) {
			return bad("environment variable %q", k)
		}
	}
	for _, m := range s.Mounts {
		if !filepath.IsAbs(m.Source) || !filepath.IsAbs(m.Destination) || filepath.Clean(m.Destination) == "/" {
			return bad("mount of %q at %q: both must be absolute, and not the root", m.Source, m.Destination)
		}
	}
	return nil
}

// SameContainer says whether b can be had from a's container without a new
// process: whether they differ in generation and resources at most.
func SameContainer(a, b Spec) bool {
	norm := func(s Spec) Spec {
		s.Generation, s.Resources = 0, Resources{}
		s.Env = maps.Clone(s.Env)
		if len(s.Env) == 0 {
			s.Env = nil
		}
		s.Args, s.Mounts = slices.Clip(s.Args), slices.Clip(s.Mounts)
		if len(s.Args) == 0 {
			s.Args = nil
		}
		if len(s.Mounts) == 0 {
			s.Mounts = nil
		}
		return s
	}
	return reflect.DeepEqual(norm(a), norm(b))
}
