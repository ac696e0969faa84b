package api

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/uuid"

	"github.com/cloudcode-dev/cloudcode/internal/container"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
)

// Bounds of what users may ask for.
const (
	maxIDLength    = 40
	maxLabels      = 64
	maxEnvBytes    = 256 << 10 // names and values together
	maxConfigBytes = 256 << 10

	minCPUMillis = 10        // less is less than the kernel's smallest share
	maxCPUMillis = 1_024_000 // 1,024 CPUs
	// OpenCode alone is about 350 MB when idle, part of it shared with the page
	// cache; it does not start in less than this.
	minMemoryBytes = 256 << 20
	maxMemoryBytes = 64 << 40
	minPIDs        = 64 // OpenCode's own threads
	maxPIDs        = 4 << 20
	minDiskBytes   = 64 << 20
	maxDiskBytes   = 1 << 50
)

var (
	idPattern        = regexp.MustCompile(`^[a-z]([a-z0-9-]*[a-z0-9])?$`)
	labelName        = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelPrefix      = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	envName          = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	reservedEnv      = []string{"HOME", "HOSTNAME", "PORT", "OPENCODE_HOSTNAME", "OPENCODE_PORT", container.EnvPassword, "OPENCODE_SERVER_USERNAME", container.EnvConfig, "OPENCODE_DB"}
	reservedPrefixes = []string{"XDG_", "CLOUDCODE_"}
)

// resourceID takes the id out of `collection/{id}`.
func resourceID(v *violations, field, collection, resource string) string {
	id, ok := strings.CutPrefix(resource, collection+"/")
	if !ok || id == "" || strings.Contains(id, "/") {
		v.add(field, fmt.Sprintf("must be %s/{id}, not %q", collection, resource))
		return ""
	}
	return id
}

func validateID(v *violations, id string) {
	switch {
	case len(id) > maxIDLength:
		v.add("session_id", fmt.Sprintf("has %d characters; at most %d are allowed", len(id), maxIDLength))
	case !idPattern.MatchString(id):
		v.add("session_id", fmt.Sprintf("%q must consist of lower-case letters, digits and hyphens, begin with a letter, and not end with a hyphen: it becomes a host name", id))
	case strings.Contains(id, "--"):
		v.add("session_id", fmt.Sprintf("%q must not contain `--`: that separates a port from the id in host names", id))
	}
}

func validateRequestID(v *violations, id string) {
	if id == "" {
		return
	}
	if err := uuid.Validate(id); err != nil || len(id) != 36 {
		v.add("request_id", "must be a UUID such as 6ba7b810-9dad-41d1-80b4-00c04fd430c8")
	}
}

func validateLabels(v *violations, field string, labels map[string]string) {
	if len(labels) > maxLabels {
		v.add(field, fmt.Sprintf("has %d entries; at most %d are allowed", len(labels), maxLabels))
	}
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		prefix, rest, prefixed := strings.Cut(key, "/")
		if !prefixed {
			prefix, rest = "", key
		}
		if !labelName.MatchString(rest) || (prefixed && (len(prefix) > 253 || !labelPrefix.MatchString(prefix))) {
			v.add(fmt.Sprintf("%s[%q]", field, key), "the key must be a name of at most 63 letters, digits, `-`, `_` and `.` that begins and ends with a letter or digit, with an optional DNS name and `/` before it")
		}
		if value := labels[key]; value != "" && !labelName.MatchString(value) {
			v.add(fmt.Sprintf("%s[%q]", field, key), fmt.Sprintf("the value %q must be empty, or at most 63 letters, digits, `-`, `_` and `.` that begin and end with a letter or digit", short(value)))
		}
	}
}

// validateSpec looks at a spec as it would be stored.
func validateSpec(v *violations, s fleet.Spec) {
	validateImage(v, s.Image)
	validateEnv(v, s.Env)
	validateConfig(v, s.OpenCodeConfig)
	validateLabels(v, "session.spec.node_selector", s.NodeSelector)
	r := s.Resources
	within(v, "cpu_millis", r.CPUMillis, minCPUMillis, maxCPUMillis, "thousandths of a CPU", "")
	within(v, "memory_bytes", r.MemoryBytes, minMemoryBytes, maxMemoryBytes, "bytes", ": OpenCode alone needs about 350 MB, so 1 GiB or more is sensible")
	within(v, "pids", r.PIDs, minPIDs, maxPIDs, "processes and threads", "")
	within(v, "disk_bytes", r.DiskBytes, minDiskBytes, maxDiskBytes, "bytes", "")
}

// validateStorage looks at what can be seen without asking any object storage.
func validateStorage(v *violations, asked *cloudcodev1.Storage) {
	const field = "session.spec.storage"
	r := protoconv.StorageRequestFromProto(asked)
	switch r.Mode {
	case "", fleet.ModeAuto, fleet.ModeMount, fleet.ModeSnapshot:
	case fleet.ModeLocal:
		if r.Profile != "" || r.S3 != nil || r.Prefix != nil {
			v.add(field+".mode", "with LOCAL the session is on the disk of a node alone: leave out profile, prefix and s3")
		}
	default:
		v.add(field+".mode", fmt.Sprintf("%q is not known: there are AUTO, LOCAL, MOUNT and SNAPSHOT", r.Mode))
	}
	if r.Profile != "" && r.S3 != nil {
		v.add(field+".profile", "leave it out, or leave out s3: the session is kept in one place")
	}
	if r.Prefix != nil {
		if err := conf.ValidatePrefix(*r.Prefix); err != nil {
			v.add(field+".prefix", err.Error())
		}
	}
}

func within(v *violations, field string, got, lowest, highest int64, unit, hint string) {
	field = "session.spec.resources." + field
	switch {
	case got == 0:
	case got < lowest:
		v.add(field, fmt.Sprintf("%d is too little: at least %d %s (or 0 for no limit)%s", got, lowest, unit, hint))
	case got > highest:
		v.add(field, fmt.Sprintf("%d is too much: at most %d %s", got, highest, unit))
	}
}

func validateImage(v *violations, image string) {
	const field = "session.spec.image"
	if image == "" {
		v.add(field, "is empty, and the server has no default image: name one, or start the server with one")
		return
	}
	if _, err := name.ParseReference(image, name.WeakValidation); err != nil || len(image) > 1024 {
		v.add(field, fmt.Sprintf("%q is no image reference such as ghcr.io/me/agent:1.0", short(image)))
	}
}

func validateEnv(v *violations, env map[string]string) {
	size := 0
	for _, key := range slices.Sorted(maps.Keys(env)) {
		value := env[key]
		size += len(key) + len(value)
		field := fmt.Sprintf("session.spec.env[%q]", short(key))
		switch {
		case !envName.MatchString(key):
			v.add(field, "the name must consist of letters, digits and `_`, and not begin with a digit")
		case slices.Contains(reservedEnv, key) || slices.ContainsFunc(reservedPrefixes, func(p string) bool { return strings.HasPrefix(key, p) }):
			v.add(field, "Cloud Code sets this itself: leave it out")
		}
		if strings.ContainsRune(value, 0) {
			v.add(field, "the value must not contain a NUL character")
		}
	}
	if size > maxEnvBytes {
		v.add("session.spec.env", fmt.Sprintf("has %d bytes; at most %d are allowed: put files into the workspace instead", size, maxEnvBytes))
	}
}

func validateConfig(v *violations, config string) {
	const field = "session.spec.opencode_config"
	if config == "" {
		return
	}
	if len(config) > maxConfigBytes {
		v.add(field, fmt.Sprintf("has %d bytes; at most %d are allowed", len(config), maxConfigBytes))
		return
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal([]byte(config), &object); err != nil || object == nil {
		reason := "it is not an object"
		if err != nil {
			reason = err.Error()
		}
		v.add(field, "must be a JSON object, as in opencode.json: "+reason)
	}
}

// short cuts what is quoted in a message.
func short(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	s = s[:most]
	for !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s + "…"
}
